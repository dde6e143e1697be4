"""What makes a folder a SentenceTransformer's, beside the encoder: pooling and what follows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

MODULES = "modules.json"
BESIDE = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
"""Files of sentence-transformers beside those of transformers; of the last the middle is the
encoder's kind, for instance bert."""


def copy_pooling(source: str, output: str | Path) -> None:
    """Copy ``source``'s modules after the encoder, if it has any: without them pooling is a mean.

    source: hub name or folder of the encoder that was converted into ``output``."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetched(source)
    listed = folder / MODULES
    if not listed.is_file():
        return
    modules = json.loads(listed.read_text())
    if not modules or modules[0].get("path"):
        return  # the encoder lies in a folder of its own, which is the one that was not opened
    for pattern in BESIDE:
        for file in folder.glob(pattern):
            shutil.copyfile(file, Path(output, file.name))
    for module in modules[1:]:
        if (folder / module["path"]).is_dir():
            shutil.copytree(
                folder / module["path"], Path(output, module["path"]), dirs_exist_ok=True
            )


def _fetched(name: str) -> Path:
    """The hub's files, where it has them; an empty place otherwise."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*BESIDE, "[0-9]*_*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return Path(name)
