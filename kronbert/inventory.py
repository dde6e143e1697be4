"""From a model, or only its config, to the sizes a plan needs."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from .errors import PlanError
from .planning import Group, Inventory, Kind, LayerSize

SMALLEST_TABLE = 128
"""Rows below which an embedding (token types) is too small to be worth converting."""

READ_AS_WEIGHT = ("*rel_embeddings", "*relative_attention_bias", "*position_embeddings.row*")
"""Embeddings whose ``.weight`` the model reads itself, past the module (DeBERTa-v2)."""

READ_AS_WEIGHT_HEADS = ("mobilebert",)
"""Model types whose masked-LM head reads ``decoder.weight`` itself: their tied table stays dense."""


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
    tables: dict[int, str] = {}
    weights: dict[int, str] = {}
    layers = []
    for name, module in model.named_modules():
        if type(module) is nn.Embedding:
            tables[id(module.weight)] = name
    for name, module in model.named_modules():
        kind = _kind(name, module)
        if kind is None:
            continue
        weight = module.weight
        out, inner = weight.T.shape if kind == "conv1d" else weight.shape
        because, tied = _dense_reason(name, kind, out, model_type), None
        if kind in ("linear", "conv1d") and id(weight) in tables:
            kind, tied = "head", tables[id(weight)]
        elif id(weight) in weights:
            because = f"it shares its weight with {weights[id(weight)]!r}"
        weights.setdefault(id(weight), name)
        layers.append(
            LayerSize(
                name=name,
                kind=kind,
                group=_group(name, kind),
                out=out,
                inner=inner,
                tied_to=tied,
                dense_because=because,
            )
        )
    if model_type in READ_AS_WEIGHT_HEADS:
        heads = {layer.tied_to for layer in layers if layer.tied_to}
        layers = [_read_by_head(layer) if layer.name in heads else layer for layer in layers]
    total = sum(parameter.numel() for parameter in model.parameters())
    return Inventory(layers=tuple(layers), parameters=total, model_type=model_type)


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The model a config describes, on the meta device."""
    import transformers

    names = getattr(config, "architectures", None) or []
    model_class = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        return model_class(config) if model_class else AutoModel.from_config(config)


def _kind(name: str, module: nn.Module) -> Kind | None:
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is Conv1D:
        return "conv1d"
    if type(module) is nn.Embedding:
        return "position" if "position" in name or name.endswith("wpe") else "embedding"
    return None


def _group(name: str, kind: Kind) -> Group:
    if kind in ("embedding", "position", "head"):
        return "embedding"
    parts = name.split(".")
    if not any(part.isdigit() for part in parts):
        return "other"
    return "attention" if any("attention" in p or "attn" in p for p in parts) else "feed-forward"


def _dense_reason(name: str, kind: Kind, rows: int, model_type: str) -> str | None:
    if any(fnmatchcase(name, pattern) for pattern in READ_AS_WEIGHT):
        return "the model reads its weight directly"
    if model_type in READ_AS_WEIGHT_HEADS and name.endswith("predictions.dense"):
        return "the model reads its weight directly"
    if kind in ("embedding", "position") and rows < SMALLEST_TABLE:
        return f"{rows} rows are too few to be worth a product"
    return None


def _read_by_head(layer: LayerSize) -> LayerSize:
    from dataclasses import replace

    return replace(layer, dense_because="the masked-LM head reads its weight directly")
