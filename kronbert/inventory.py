"""Reads a model, or only its config, for planning: layers and sizes. And swaps layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from .errors import PlanError
from .planning import Group, Inventory, Kind, LayerSize

SMALLEST_TABLE = 128
"""Rows below which an embedding (token types) is too small to be worth converting."""

READ_AS_WEIGHT = ("*rel_embeddings", "*relative_attention_bias", "*position_embeddings.row*")
"""Embeddings whose ``.weight`` the model reads itself, past the module (DeBERTa-v2)."""

WRITTEN_TO = {"rwkv": ("*.attention.output", "*.feed_forward.value")}
"""Model type -> layers whose ``.weight`` the model changes in place: a product's would be lost."""

READ_AS_WEIGHT_HEADS = ("mobilebert",)
"""Model types whose masked-LM head reads ``decoder.weight`` itself: the tied table stays dense."""

INITIALISED = "_is_hf_initialized"

PLACES = {"position", "positions", "pos", "wpe"}
"""Words of the name of a table of positions."""


def inventory(model_or_config: Any) -> Inventory:
    """Every Linear, Conv1D and Embedding with its sizes, and the parameters of the whole model.

    A config is built on the meta device, with the class its ``architectures`` names (else
    `AutoModel`), so no memory is taken."""
    if isinstance(model_or_config, PretrainedConfig):
        model = skeleton(model_or_config)
    elif isinstance(model_or_config, nn.Module):
        model = model_or_config
    else:
        raise PlanError(
            f"plan({type(model_or_config).__name__}): expected a model (nn.Module) or a "
            "transformers config. For a hub name: AutoConfig.from_pretrained(name)."
        )
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    modules = {name: m for name, m in model.named_modules() if _kind(name, m) is not None}
    roots = roots_of(model)
    weights: dict[str, torch.Tensor] = {name: m.weight for name, m in modules.items()}
    tables = {id(weights[name]): name for name, m in modules.items() if type(m) is nn.Embedding}
    # A table may have heads; any other sharing ties two layers that would go separate ways.
    readers = Counter(
        id(weights[name])
        for name, m in modules.items()
        if id(weights[name]) not in tables or type(m) is nn.Embedding
    )
    own = {id(module) for module in modules.values()}
    outside = {
        id(parameter): f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if id(module) not in own
        for key, parameter in module.named_parameters(recurse=False)
    }
    layers = []
    for name, module in modules.items():
        weight = weights[name]
        kind = _kind(name, module)
        assert kind is not None  # the others are not in `modules`
        if weight.dim() != 2:
            raise PlanError(
                f"{name!r}: its weight has shape {tuple(weight.shape)}, expected two dimensions. "
                "Convert before sharding the model (FSDP, DeepSpeed)."
            )
        out, inner = weight.T.shape if kind == "conv1d" else weight.shape
        tied = tables.get(id(weight)) if kind == "linear" else None
        if tied:
            kind = "head"
        because, counted = _dense_reason(name, module, kind, model_type), True
        if _is_beside(name, roots) and hasattr(
            model, "save_pretrained"
        ):  # as a SentenceTransformer does
            because = "no config would hold its shapes: it lies outside the model of transformers"
        if id(weight) in outside:
            because = f"it shares its weight with {outside[id(weight)]!r}"
        if readers[id(weight)] > 1:
            others = [n for n, w in weights.items() if w is weight and n != name]
            because = f"it shares its weight with {others[0]!r}"
            counted = name == next(n for n, w in weights.items() if w is weight)
        layers.append(
            LayerSize(
                name=name,
                kind=kind,
                group=group_within(name, kind, roots),
                out=out,
                inner=inner,
                tied_to=tied,
                dense_because=because,
                counted=counted,
            )
        )
    if model_type in READ_AS_WEIGHT_HEADS:
        heads = {layer.tied_to for layer in layers if layer.tied_to}
        reason = "the masked-LM head reads its weight directly"
        layers = [replace(x, dense_because=reason) if x.name in heads else x for x in layers]
    total = sum(parameter.numel() for parameter in model.parameters())
    return Inventory(layers=tuple(layers), parameters=total, model_type=model_type)


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The model a config describes, on the meta device."""
    import transformers

    names = getattr(config, "architectures", None) or []
    if names and not hasattr(transformers, names[0]):
        raise PlanError(
            f"config.architectures names {names[0]!r}, which transformers does not have. Build the "
            "model and pass it instead of its config."
        )
    with torch.device("meta"):
        if names:
            return getattr(transformers, names[0])(config)
        return transformers.AutoModel.from_config(config)


def swap(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put ``new`` (full name -> module) in the places of the modules of those names.

    A module that stands in several places is swapped in all of them."""
    modules = dict(model.named_modules())
    instead = {id(modules[name]): module for name, module in new.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in instead:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, instead[id(module)])


def keep_mark(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` transformers' mark of weights that are no draw, if ``old`` has it: a model of
    transformers that is built around these (`EncoderDecoderModel`) draws unmarked ones anew."""
    if getattr(old, INITIALISED, False):
        setattr(new, INITIALISED, True)


def _kind(name: str, module: nn.Module) -> Kind | None:
    """None for anything else, subclasses too: they may compute something else."""
    plain = type(module)
    if parametrize.is_parametrized(module):  # in a class of its own, beneath which is the module's
        plain = plain.__bases__[0]
    if plain is nn.Linear:
        return "linear"
    if plain is Conv1D:
        return "conv1d"
    if plain is nn.Embedding:
        words = re.split(r"[._]", name.lower())
        return "position" if PLACES.intersection(words) else "embedding"
    return None


def roots_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the models of transformers that a module is or holds, as "0.auto_model"."""
    from transformers import PreTrainedModel  # its import is a heavy one

    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(root == "" or name.startswith(f"{root}.") for root in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append(name)
    return tuple(found)


def _is_beside(name: str, roots: Iterable[str]) -> bool:
    """Whether a wrapper's layer lies outside of the models of transformers that it holds."""
    starts = [f"{root}." for root in roots if root]
    return bool(starts) and not any(name.startswith(start) for start in starts)


def group_within(name: str, kind: Kind, roots: Iterable[str]) -> Group:
    """`group_of` in the model of transformers that holds the layer: a wrapper's numbers count
    none, and its own layers are others."""
    roots = tuple(roots)
    if _is_beside(name, roots) and kind in ("linear", "conv1d"):
        return "other"
    outer = next((f"{root}." for root in roots if root and name.startswith(f"{root}.")), "")
    return group_of(name.removeprefix(outer), kind)


def group_of(name: str, kind: Kind) -> Group:
    """Which part of the model a layer belongs to, by its full name."""
    if kind in ("embedding", "position", "head"):
        return "embedding"
    parts = name.split(".")
    if not any(part.isdigit() for part in parts):
        return "other"
    attention = any("attention" in p or "attn" in p for p in name.lower().split("."))
    return "attention" if attention else "feed-forward"


def _dense_reason(name: str, module: nn.Module, kind: Kind, model_type: str) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is parametrised"
    if any(fnmatchcase(name, pattern) for pattern in READ_AS_WEIGHT):
        return "the model reads its weight directly"
    if any(fnmatchcase(name, pattern) for pattern in WRITTEN_TO.get(model_type, ())):
        return "the model changes its weight in place"
    if model_type in READ_AS_WEIGHT_HEADS and name.endswith("predictions.dense"):
        return "the model reads its weight directly"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return "max_norm, scale_grad_by_freq and sparse have no Kronecker form"
        if module.num_embeddings < SMALLEST_TABLE:
            return f"{module.num_embeddings} rows are too few to be worth a product"
    return None
