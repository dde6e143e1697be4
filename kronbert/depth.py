"""`fewer_layers`: a shallower model, for students that have fewer layers than their teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .errors import PlanError, expect_model
from .prepared import unprepare


def spread_layers(layers: int, of: int) -> tuple[int, ...]:
    """``layers`` of ``of`` layers, counted from 1, evenly spaced and with the last one.

    4 of 6: (1, 3, 4, 6). Where one divides the other, TinyBERT's choice (Jiao et al. 2020)."""
    if not 1 <= layers <= of:
        raise PlanError(f"layers={layers}: expected 1 to {of}, which the model has.")
    return tuple(m * of // layers for m in range(1, layers + 1))


def fewer_layers(model: nn.Module, layers: int | Sequence[int]) -> Any:
    """A copy of a transformers model that has only some of its layers (Sajjad et al. 2020).

    layers: how many, evenly spaced (`spread_layers`), or which, counted from 1, in ascending order.
    Embeddings, head, dtype and device stay; the config says how many layers are left. Of four
    layers a student can keep more than of six, at one size, and is faster:
    ``convert(fewer_layers(teacher, 4), factor=...)``; factor then counts against the copy. Layer m
    learns from the layer whose weights it has, a layer map (1, 3, 4, 6)."""
    from transformers import PreTrainedModel

    expect_model("fewer_layers", model)
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(depth, int):
        raise PlanError(
            f"fewer_layers({type(model).__name__}): expected a model of transformers whose config "
            "has num_hidden_layers. Of a wrapper give the model inside; of a SentenceTransformer "
            "model[0].model."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise PlanError(
            "fewer_layers: the model was converted or quantised before. Take its layers first."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise PlanError(
            f"fewer_layers({type(model).__name__}): it has an encoder and a decoder. Take "
            "the layers of the encoder, a model of its own."
        )
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise PlanError(
            "fewer_layers: layer m divides its attention scores by m (scale_attn_by_inverse_"
            "layer_idx), so none can take another's place. Take a model without it."
        )
    kept = _kept(layers, depth)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    for name in ("layer_types", "attention_window"):  # of every layer: ModernBERT's, Longformer's
        each = getattr(config, name, None)
        if isinstance(each, list) and len(each) == depth:
            setattr(config, name, [each[layer - 1] for layer in kept])
    if len(kept) == depth:
        whole = copy.deepcopy(model)
        unprepare(whole)
        return whole
    try:
        with torch.random.fork_rng(devices=[]):  # what is initialised here is thrown away
            copied: Any = type(model)(config)
        _fill(copied, model, kept, depth)
    except torch.OutOfMemoryError:
        raise  # says nothing of the layers
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise PlanError(
            f"fewer_layers({type(model).__name__}, {kept}): no model of its class has those layers "
            f"({' '.join(str(error).split())})."
        ) from error
    return copied.train(model.training)


def _fill(copied: Any, model: Any, kept: tuple[int, ...], depth: int) -> None:
    """Every tensor of ``copied`` from its place in ``model``."""
    modules = dict(model.named_modules())
    stacks = [
        f"{name}."
        for name, module in copied.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == len(kept)
        and isinstance(modules.get(name), nn.ModuleList)
        and len(modules[name]) == depth
    ]
    if len(stacks) != 1:
        raise PlanError(
            f"fewer_layers({type(model).__name__}): found {len(stacks)} lists of {depth} layers, "
            "expected one."
        )
    stack = stacks[0]

    def source(name: str) -> str:
        if not name.startswith(stack):
            return name
        place, _, rest = name.removeprefix(stack).partition(".")
        return f"{stack}{kept[int(place)] - 1}.{rest}"

    state, names = model.state_dict(), [*copied.state_dict()]
    dropped = {f"{stack}{layer - 1}." for layer in range(1, depth + 1) if layer not in kept}
    wanted = {name for name in state if not any(name.startswith(layer) for layer in dropped)}
    for name in sorted(wanted ^ {source(name) for name in names}):
        raise PlanError(
            f"fewer_layers({type(model).__name__}, {kept}): {name!r} has no place in a model of "
            f"{len(kept)} layers, or is missing. Its layers are not alike: keep other ones, "
            f"layer 1 among them; evenly spaced ones have it from {depth // 2 + 1} of {depth} on."
        )
    copied.load_state_dict({name: state[source(name)].clone() for name in names}, assign=True)
    copied.tie_weights()
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    for name, _ in list(copied.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        copied.get_submodule(parent)._buffers[leaf] = buffers[source(name)].clone()
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(parameters[source(name)].requires_grad)


def _kept(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    if type(layers) is int:
        return spread_layers(layers, depth)
    kept = tuple(layers) if isinstance(layers, Iterable) else ()
    whole = all(type(x) is int and 1 <= x <= depth for x in kept)
    if not kept or not whole or kept != tuple(sorted(set(kept))):
        raise PlanError(
            f"fewer_layers(layers={layers!r}): expected how many, or layers from 1 to {depth} in "
            "ascending order."
        )
    return kept
