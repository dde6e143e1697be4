"""The checkpoint format, as transformers sees it: quant_method "kronecker" in config.json.

A saved student is plain safetensors and a config whose ``quantization_config`` names the shapes of
every Kronecker layer. `from_pretrained` of any Auto class then builds those modules on the meta
device and fills them from the file; the loaded model is an ordinary one afterwards (trainable,
castable), so nothing of transformers' quantised-model handling stays on it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import SCHEMA, KroneckerConfig, Rule
from .embedding import KroneckerEmbedding
from .errors import CheckpointError, ShapeError, near
from .head import KroneckerLMHead
from .inventory import inventory, swap
from .linear import KroneckerLinear
from .planning import Inventory, Plan, PlannedLayer
from .shapes import Groups, check_groups, parse_groups

METHOD = "kronecker"
TIED = "tied to "
TIED_NAMES = ("_tied_weights_keys", "all_tied_weights_keys")
UNTIED = "_kronbert_untied"
"""Where `untie` keeps what the module itself had of these; None: nothing, its class has it."""

KRONECKER_MODULES = (KroneckerLinear, KroneckerEmbedding, KroneckerLMHead)


class KroneckerQuantizationConfig(QuantizationConfigMixin):
    """layers: module name -> shapes ("4:384x48*2x16", groups joined by " + "), or "tied to NAME".
    dense_parameters: of the model before conversion. schema: refused when newer than known."""

    def __init__(
        self,
        layers: Mapping[str, str] | None = None,
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
        if not isinstance(layers, Mapping) or not layers:
            raise CheckpointError(
                f"config.json: quantization_config has layers={layers!r}, expected a mapping from "
                "module names to shapes. Save the student again."
            )
        for name, spec in layers.items():
            _check_spec(name, spec)
        self.quant_method = quant_method  # type: ignore[assignment]
        self.schema = schema
        self.layers = dict(layers)
        self.dense_parameters = dense_parameters

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dictionary that config.json holds: `from_pretrained(config=student.config)`
        asks a configuration whichever it is."""
        return self.to_dict().get(key, default)

    @classmethod
    def of_layers(
        cls, rows: Mapping[str, PlannedLayer], dense_parameters: int
    ) -> KroneckerQuantizationConfig:
        """rows: of a plan, by their names in the part of the model that is saved."""
        own = {row.size.name: name for name, row in rows.items()}
        layers = {
            name: f"{TIED}{own.get(row.size.tied_to, row.size.tied_to)}"
            if row.size.tied_to
            else " + ".join(shape.spec for shape in row.groups)
            for name, row in rows.items()
        }
        return cls(layers, dense_parameters)

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
        _tie(model)
        sizes = inventory(model)
        new = place(model, self.quantization_config.layers, sizes)
        files = kwargs.get("checkpoint_files")
        if files:
            check_tensors([Path(file) for file in files], new, model)
        untie(model)
        model.kronecker_plan = _plan(sizes, new)  # type: ignore[assignment]
        self.sizes = {name: p.shape for name, p in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, parameter in model.named_parameters():
            # Up to transformers 5.17 nothing else looks: a head of 2 labels would stand in for 3.
            expected = self.sizes.get(name, parameter.shape)
            if parameter.shape != expected:
                raise CheckpointError(
                    f"tensor {name!r} has shape {tuple(parameter.shape)}, the model expects "
                    f"{tuple(expected)}. Load it with the sizes (num_labels) it was saved with."
                )
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        for module in model.modules():
            if hasattr(module, "config"):
                vars(module.config).pop("_is_quantized", None)
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


def place(
    model: nn.Module, layers: Mapping[str, str], sizes: Inventory | None = None
) -> dict[str, nn.Module]:
    """Swap the named dense modules of ``model`` for empty Kronecker ones; returns the new ones.

    Names are those of the saved class. Another class of the same body finds them under its own
    names, layers it does not have (a head, a pooler) are left out, and a head that it ties to a
    Kronecker embedding becomes a Kronecker one."""
    modules = dict(model.named_modules())
    local = {
        name.removesuffix(".weight"): own.removesuffix(".weight")
        for name, own in own_names(model, [f"{name}.weight" for name in layers]).items()
    }
    new: dict[str, nn.Module] = {}
    heads = {x.name: x.tied_to for x in (sizes or inventory(model)).layers}
    for saved, spec in layers.items():
        name = local[saved]
        if spec.startswith(TIED):
            tied_to = spec.removeprefix(TIED)
            if tied_to not in layers:
                raise CheckpointError(
                    f"config.json: {saved!r} is {spec}, which is no Kronecker layer. Save the "
                    "student again."
                )
            if name in modules:
                heads[name] = local[tied_to]
        elif name in modules:
            new[name] = _empty_like(modules[name], parse_groups(spec), saved)
    for name, table_name in heads.items():
        table = new.get(table_name or "")
        if isinstance(table, KroneckerEmbedding):
            new[name] = KroneckerLMHead(table, getattr(modules[name], "bias", None))
    if not new:
        raise CheckpointError(
            f"config.json: none of the Kronecker layers ({next(iter(layers), 'none')!r}, ...) is "
            f"in {type(model).__name__}. Load it with the class that saved it; of a model whose "
            "parts share its config (BART), save the whole."
        )
    swap(model, new)
    return new


def own_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Tensor names of a checkpoint -> the names that transformers loads them under.

    With or without the prefix of the body, and renamed where an architecture was rewritten."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = getattr(model, "base_model_prefix", None), model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in stored
    }


def _plan(sizes: Inventory, new: Mapping[str, nn.Module]) -> Plan:
    """The plan that a loaded model stands for; errors of the fits are not stored."""
    names = {id(module): name for name, module in new.items()}
    parameters, layers = sizes.parameters, []
    for size in sizes.layers:
        module = new.get(size.name)
        if isinstance(module, KroneckerLMHead) and not size.tied_to:
            # The saved model tied what its class, by its config, does not.
            size = replace(size, kind="head", group="embedding", tied_to=names[id(module.table)])
            parameters -= size.out * size.inner
        layers.append(PlannedLayer(size=size, groups=groups_of(module) if module else ()))
    rules = {
        layer.size.name: Rule(groups=layer.groups)
        for layer in layers
        if layer.groups and not layer.size.tied_to
    }
    return Plan(
        layers=tuple(layers),
        dense_parameters=parameters,
        config=KroneckerConfig(rules=rules),
        model_type=sizes.model_type,
    )


def groups_of(module: nn.Module) -> Groups:
    """The shapes of a Kronecker module; a head's are its embedding's."""
    if isinstance(module, KroneckerLMHead):
        return module.table.groups
    assert isinstance(module, KroneckerLinear | KroneckerEmbedding)
    return module.groups


def _tie(model: nn.Module) -> None:
    """Tie what transformers ties after loading: by that, heads are known as heads."""
    pairs: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in pairs.items():
        parent, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_parameter(source))


def untie(model: nn.Module) -> None:
    """Take converted weights off transformers' lists of tied names: a `KroneckerLMHead` reads its
    embedding itself, and there is no ``weight`` to tie any more."""
    for module in model.modules():
        for attribute in TIED_NAMES:
            pairs = getattr(module, attribute, None)
            if isinstance(pairs, Mapping):
                kept = {
                    target: source
                    for target, source in pairs.items()
                    if _present(module, target) and _present(module, source)
                }
                if len(kept) != len(pairs):
                    before = vars(module).setdefault(UNTIED, {})
                    before.setdefault(attribute, vars(module).get(attribute))
                    setattr(module, attribute, kept)


def release(model: nn.Module) -> None:
    """Undo what `convert` and `untie` wrote, on a merged copy."""
    config: Any = model.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    for module in model.modules():
        for name, own in vars(module).pop(UNTIED, {}).items():
            if own is None:
                vars(module).pop(name, None)
            else:
                setattr(module, name, own)  # DeBERTa's and Marian's instances have some
        expanded = getattr(module, "get_expanded_tied_weights_keys", None)
        if expanded is not None:
            module.all_tied_weights_keys = expanded(all_submodels=True)


def _present(model: nn.Module, name: str) -> bool:
    """False only for a parameter name whose module is a Kronecker one without it."""
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return True
    return not isinstance(module, KRONECKER_MODULES) or leaf in module._parameters


def _check_spec(name: str, spec: Any) -> None:
    try:
        if not isinstance(spec, str):
            raise ShapeError(f"{spec!r}: expected text.")
        if not spec.startswith(TIED):
            parse_groups(spec)
    except ShapeError as error:
        raise CheckpointError(f"config.json: layer {name!r}: {error}") from error


def _empty_like(dense: nn.Module, groups: Groups, name: str) -> nn.Module:
    if isinstance(dense, nn.Embedding | nn.Linear):
        out, inner = dense.weight.shape
    elif isinstance(dense, Conv1D):
        inner, out = dense.weight.shape
    else:
        raise CheckpointError(
            f"config.json: layer {name!r} is a {type(dense).__name__} in this model, expected a "
            "Linear, Conv1D or Embedding. Load it with the class that saved it."
        )
    try:
        check_groups(groups, out, inner, repr(name), table=isinstance(dense, nn.Embedding))
    except ShapeError as error:
        raise CheckpointError(
            f"config.json: {error} The sizes in config.json were changed after saving."
        ) from error
    device, dtype = dense.weight.device, dense.weight.dtype
    if isinstance(dense, nn.Embedding):
        return KroneckerEmbedding(out, inner, groups, dense.padding_idx, device, dtype)
    module = KroneckerLinear(inner, out, groups, dense.bias is not None, device, dtype)
    module.conv1d = isinstance(dense, Conv1D)
    return module


def check_tensors(files: list[Path], layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raise `CheckpointError` when a tensor of a Kronecker layer is missing, extra or misshapen.

    transformers itself only warns and fills such tensors with random numbers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes.update(safetensors_shapes(file))
    names = own_names(model, shapes)
    found: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in layers}
    prefix = getattr(model, "base_model_prefix", "") + "."
    for stored, shape in shapes.items():
        layer, _, leaf = names[stored].rpartition(".")
        # transformers adds or removes the prefix only for tensors that the model has.
        for name in {layer, prefix + layer, layer.removeprefix(prefix)} & found.keys():
            found[name][leaf] = shape
    where = files[0].parent
    mixed = "The two files do not belong together: save the student again."
    for name, module in layers.items():
        own = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        for key, shape in own.items():
            if key not in found[name]:
                if isinstance(module, KroneckerLMHead):
                    continue  # its bias may be stored under the model's own name for it
                if "weight" in found[name]:
                    raise CheckpointError(
                        f"{where}: {name!r} was dense when it was saved (the file has "
                        f"'{name}.weight'), but config.json has shapes for it. Take it out of "
                        "quantization_config.layers in config.json, or, where none of them is left "
                        "in the model, quantization_config."
                    )
                raise CheckpointError(
                    f"{where}: tensor '{name}.{key}' {shape} is missing. The checkpoint is "
                    "incomplete: copy or save it again."
                )
            if found[name][key] != shape:
                raise CheckpointError(
                    f"{where}: tensor '{name}.{key}' has shape {found[name][key]}, config.json "
                    f"says {shape}. {mixed}"
                )
        for key in found[name].keys() - own.keys():
            raise CheckpointError(
                f"{where}: tensor '{name}.{key}' is not part of the layer's shapes in "
                f"config.json. {mixed}"
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
