"""`load`: a saved student, strictly, with the class that saved it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from .errors import CheckpointError
from .hf import METHOD
from .shipped import find_shipped, is_shipped_name, known_students

HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
"""Arguments that say which files of a repository are meant: for the config as for the weights."""


def load(folder: str | Path, **kwargs: Any) -> nn.Module:
    """The student in ``folder`` (or of a hub name), built with the class that saved it.

    "kronbert/NAME" is looked for as `shipped_path` does, then on the hub. Unlike the Auto classes
    it refuses a checkpoint with missing, unexpected or (unless ignore_mismatched_sizes=True)
    misshapen tensors; a model that was saved without a pooler is built without one. kwargs go to
    `from_pretrained` (dtype, device_map, ...).
    Raises `CheckpointError`."""
    import transformers

    name, folder = folder, find_shipped(folder) or folder
    if "output_loading_info" in kwargs:
        raise CheckpointError(
            "load(output_loading_info=...): it raises an error where the information would have an "
            "entry. Use the class's own from_pretrained."
        )
    if kwargs.get("subfolder", "") is None:
        del kwargs["subfolder"]
    path = Path(folder, kwargs.get("subfolder", ""))
    if path.exists() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no config.json. Give the folder that save_pretrained wrote."
        )
    hub = {key: kwargs[key] for key in HUB if key in kwargs}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **hub)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(name, str) and folder is name and is_shipped_name(name):
            raise CheckpointError(
                f"{name!r}: no student of that name here, and the hub does not give it. "
                f"{known_students(name)}"
            ) from error
        raise CheckpointError(
            f"{folder}: config.json cannot be read ({error}). Give the folder that save_pretrained "
            "wrote, or a hub name while online."
        ) from error
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    if method != METHOD:
        raise CheckpointError(
            f"{folder}: no Kronecker checkpoint (quant_method {method!r}). Load dense models with "
            "transformers' own classes."
        )
    names = config.architectures or ["AutoModel"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise CheckpointError(
            f"{folder}: config.json names the class {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have. Load it with that class's from_pretrained."
        )
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
        bare = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
        missing = info["missing_keys"]
        if missing and bare and all("pooler." in key for key in missing):
            kwargs["add_pooling_layer"] = False
            model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error
    wanted = {"mismatched_keys"} if kwargs.get("ignore_mismatched_sizes") else set()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind) and kind not in wanted:
            raise CheckpointError(
                f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:5]}. The "
                "checkpoint and its config do not belong together: save the student again."
            )
    return model
