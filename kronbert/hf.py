"""The checkpoint format, as transformers sees it: quant_method "kronecker" in config.json.

A saved student is plain safetensors and a config whose ``quantization_config`` names the shapes of
every Kronecker layer. `from_pretrained` of any Auto class then builds those modules on the meta
device and fills them from the file; the loaded model is an ordinary one afterwards (trainable,
castable), so nothing of transformers' quantised-model handling stays on it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import SCHEMA
from .embedding import KroneckerEmbedding
from .errors import CheckpointError, near
from .head import KroneckerLMHead
from .linear import KroneckerLinear
from .planning import Plan
from .shapes import Groups, KroneckerShape, parse_groups

METHOD = "kronecker"
TIED = "tied to "


class KroneckerQuantizationConfig(QuantizationConfigMixin):
    """layers: module name -> shapes ("4:384x48*2x16", groups joined by " + "), or "tied to NAME".
    dense_parameters: of the model before conversion. schema: refused when newer than known."""

    def __init__(
        self,
        layers: Mapping[str, str],
        dense_parameters: int = 0,
        schema: int = SCHEMA,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if not isinstance(schema, int) or schema > SCHEMA:
            raise CheckpointError(
                f"config.json: the Kronecker checkpoint has schema {schema!r}, this kronbert knows "
                f"{SCHEMA}. Upgrade: pip install -U kronbert."
            )
        if unknown:
            key = next(iter(unknown))
            raise CheckpointError(
                f"config.json: unknown key {key!r} in quantization_config. "
                f"{near(key, ('layers', 'dense_parameters', 'schema'))}"
            )
        self.quant_method = quant_method
        self.schema = schema
        self.layers = dict(layers)
        self.dense_parameters = dense_parameters

    @classmethod
    def from_plan(cls, plan: Plan) -> KroneckerQuantizationConfig:
        layers = {
            layer.size.name: f"{TIED}{layer.size.tied_to}"
            if layer.size.tied_to
            else " + ".join(shape.spec for shape in layer.groups)
            for layer in plan.converted
        }
        return cls(layers, plan.dense_parameters)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "schema": self.schema,
            "dense_parameters": self.dense_parameters,
            "layers": dict(self.layers),
        }


class KroneckerQuantizer(HfQuantizer):
    """Puts empty Kronecker modules into a model that `from_pretrained` is about to fill."""

    requires_calibration = True
    quantization_config: KroneckerQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        layers = place(model, self.quantization_config.layers)
        files = kwargs.get("checkpoint_files")
        if files:
            check_tensors([Path(file) for file in files], layers, model)
        from .conversion import untie

        untie(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def place(model: nn.Module, layers: Mapping[str, str]) -> dict[str, nn.Module]:
    """Swap the named dense modules of ``model`` for empty Kronecker ones; returns the new ones.

    Names are those of the saved class; another class of the same body (AutoModel) finds them with
    its prefix added or removed, and layers it does not have (a head, a pooler) are left out."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    modules = dict(model.named_modules())

    def local(name: str) -> str | None:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in modules:
                return candidate
        return None

    new: dict[str, nn.Module] = {}
    for saved, spec in sorted(layers.items(), key=lambda item: item[1].startswith(TIED)):
        name = local(saved)
        if name is None:
            continue
        dense = modules[name]
        if spec.startswith(TIED):
            table = new.get(local(spec.removeprefix(TIED)) or "")
            if not isinstance(table, KroneckerEmbedding):
                raise CheckpointError(
                    f"config.json: {saved!r} is {spec}, which is no Kronecker embedding of this "
                    "model. Save the student again."
                )
            new[name] = KroneckerLMHead(table, getattr(dense, "bias", None))
        else:
            new[name] = _empty_like(dense, parse_groups(spec), saved)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new[name])
    if not new:
        raise CheckpointError(
            f"config.json: none of the Kronecker layers ({next(iter(layers), 'none')!r}, ...) is "
            f"in {type(model).__name__}. Load it with the class that saved it."
        )
    return new


def _empty_like(dense: nn.Module, groups: Groups, name: str) -> nn.Module:
    to = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    check = {"embedding": isinstance(dense, nn.Embedding)}
    if check["embedding"]:
        return KroneckerEmbedding(
            dense.num_embeddings, dense.embedding_dim, groups, dense.padding_idx, **to
        )
    inner, out = dense.weight.shape
    if isinstance(dense, nn.Linear):
        out, inner = inner, out
    return KroneckerLinear(inner, out, groups, bias=dense.bias is not None, **to)


def check_tensors(files: list[Path], layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raise `CheckpointError` when a tensor of a Kronecker layer is missing, extra or misshapen.

    transformers itself only warns and fills such tensors with random numbers."""
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        stored.update(safetensors_shapes(file))
    prefix = getattr(model, "base_model_prefix", "") + "."
    for name, module in layers.items():
        own = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        found: dict[str, tuple[int, ...]] = {}
        for start in (name, prefix + name, name.removeprefix(prefix)):
            for key in stored:
                if key.startswith(start + ".") and "." not in key[len(start) + 1 :]:
                    found.setdefault(key[len(start) + 1 :], stored[key])
        if isinstance(module, KroneckerLMHead):
            # Its bias may be stored under the model's own name for it.
            own = {key: shape for key, shape in own.items() if key in found}
        for key, shape in own.items():
            if key not in found:
                raise CheckpointError(
                    f"{files[0].parent}: tensor '{name}.{key}' {shape} is missing. The checkpoint "
                    "is incomplete: copy or save it again."
                )
            if found[key] != shape:
                raise CheckpointError(
                    f"{files[0].parent}: tensor '{name}.{key}' has shape {found[key]}, config.json "
                    f"says {shape}. The two files do not belong together: save the student again."
                )
        for key in found:
            if key not in own:
                raise CheckpointError(
                    f"{files[0].parent}: tensor '{name}.{key}' is not part of the layer's shapes "
                    "in config.json. The two files do not belong together: save the student again."
                )


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header; `CheckpointError` if truncated."""
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file}: expected safetensors. Save with save_pretrained, which writes nothing else."
        )
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length + 8 > size:
            raise CheckpointError(f"{file}: truncated ({size} bytes). Copy or download it again.")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(
                f"{file}: its header is no JSON. Copy or download it again."
            ) from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if length + 8 + end > size:
        raise CheckpointError(
            f"{file}: truncated: {size} bytes of {length + 8 + end}. Copy or download it again."
        )
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def register() -> None:
    """Tell transformers about quant_method "kronecker"; once."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(KroneckerQuantizationConfig)
        register_quantizer(METHOD)(KroneckerQuantizer)


def shapes_of(config: Any) -> dict[str, tuple[KroneckerShape, ...]]:
    """Module name -> shapes of a model config's Kronecker layers (tied heads left out)."""
    stored = getattr(config, "quantization_config", None)
    layers = stored.get("layers", {}) if isinstance(stored, dict) else getattr(stored, "layers", {})
    return {n: parse_groups(spec) for n, spec in layers.items() if not spec.startswith(TIED)}


