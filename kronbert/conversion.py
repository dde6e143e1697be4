"""plan, convert and merge: everything is checked and built before anything is swapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import KroneckerConfig
from .embedding import KroneckerEmbedding
from .errors import PlanError
from .head import KroneckerLMHead
from .inventory import inventory
from .linear import KroneckerLinear
from .planning import Inventory, Plan, make_plan

KRONECKER_MODULES = (KroneckerLinear, KroneckerEmbedding, KroneckerLMHead)


def plan(
    model_or_config: Any,
    factor: float | None = None,
    *,
    preset: str | None = None,
    rules: Mapping[str, Any] | None = None,
    keep: Sequence[str] | None = None,
    config: KroneckerConfig | None = None,
    errors: bool = True,
) -> Plan:
    """What `convert` would do, before any weight is touched: a printable, editable `Plan`.

    model_or_config: a model, or a transformers config (no weights needed). factor, preset, rules,
    keep: see `KroneckerConfig`; or give one as ``config``. errors: with a model, fit every layer to
    print its relative error (seconds for BERT-base; False: sizes only)."""
    if isinstance(model_or_config, nn.Module):
        _refuse_converted(model_or_config)
    wanted = _config(factor, preset, rules, keep, config)
    made = make_plan(inventory(model_or_config), wanted)
    if not errors or not isinstance(model_or_config, nn.Module):
        return made
    modules = dict(model_or_config.named_modules())
    if any(modules[layer.size.name].weight.is_meta for layer in made.converted):
        return made
    _check_weights(model_or_config, made)
    fits = {
        layer.size.name: _fit(modules[layer.size.name], layer.groups)[1]
        for layer in made.converted
        if layer.size.tied_to is None
    }
    return made.with_errors(fits)


def convert(
    model: nn.Module,
    factor: float | None = None,
    *,
    preset: str | None = None,
    rules: Mapping[str, Any] | None = None,
    keep: Sequence[str] | None = None,
    config: KroneckerConfig | None = None,
    plan: Plan | None = None,
    inplace: bool = False,
) -> nn.Module:
    """A student of ``model`` whose planned layers are the nearest sums of Kronecker products.

    The teacher stays untouched (inplace=True reuses its modules instead of copying the dense
    ones). plan: one made, and perhaps edited, before. The student's plan, with the relative error
    of every fit, is its ``kronecker_plan``. Raises before anything is changed."""
    _refuse_converted(model)
    sizes = inventory(model)
    if plan is None:
        plan = make_plan(sizes, _config(factor, preset, rules, keep, config))
    else:
        if any(given is not None for given in (factor, preset, rules, keep, config)):
            raise PlanError("convert(plan=...): the plan fixes every shape; give it alone.")
        _check_plan(plan, sizes)
    _check_weights(model, plan)
    modules = dict(model.named_modules())
    memo: dict[int, Any] = {}
    errors: dict[str, float] = {}
    new: dict[str, nn.Module] = {}
    for layer in plan.converted:
        if layer.size.tied_to is None:
            dense = modules[layer.size.name]
            new[layer.size.name], errors[layer.size.name] = _fit(dense, layer.groups)
    for layer in plan.converted:
        dense = modules[layer.size.name]
        if layer.size.tied_to is not None:
            table = new[layer.size.tied_to]
            if not isinstance(table, KroneckerEmbedding):
                raise PlanError(f"{layer.size.name!r}: it is tied to a layer that stays dense.")
            new[layer.size.name] = KroneckerLMHead(table)
        bias = getattr(dense, "bias", None)
        if bias is not None:
            # The same Parameter (a head's bias is tied to the model's), or its one copy.
            new[layer.size.name].bias = bias if inplace else copy.deepcopy(bias, memo)
    if "" in new:
        student = new[""]
    elif inplace:
        for name, module in new.items():
            _set(model, name, module)
        student = model
    else:
        memo.update({id(modules[name]): module for name, module in new.items()})
        student = copy.deepcopy(model, memo)
    adopt(student, plan.with_errors(errors))
    return student


def merge(model: nn.Module) -> nn.Module:
    """The dense twin of a converted model: the same function, plain modules, no kronbert needed.

    A copy; every weight is multiplied out in float64 and rounded once."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, KRONECKER_MODULES)}
    if not found:
        raise PlanError("merge: the model holds no Kronecker layer. Give the converted student.")
    conv1d = {
        layer.size.name
        for layer in getattr(model, "kronecker_plan", None).layers
        if layer.size.kind == "conv1d"
    } if getattr(model, "kronecker_plan", None) else set()
    memo: dict[int, Any] = {}
    tables: dict[int, nn.Embedding] = {}
    new: dict[str, nn.Module] = {}
    for name, module in found.items():
        if isinstance(module, KroneckerEmbedding):
            tables[id(module)] = module.to_embedding()
            new[name] = tables[id(module)]
    for name, module in found.items():
        if isinstance(module, KroneckerLinear):
            new[name] = _conv1d(module) if name in conv1d else module.to_linear()
        elif isinstance(module, KroneckerLMHead):
            new[name] = module.to_linear(tables[id(module.__dict__["embedding"])])
        bias = getattr(module, "bias", None)
        if bias is not None:
            new[name].bias = copy.deepcopy(bias, memo)
    if "" in new:
        return new[""]
    memo.update({id(found[name]): module for name, module in new.items()})
    dense = copy.deepcopy(model, memo)
    release(dense)
    return dense


def adopt(model: nn.Module, plan: Plan) -> None:
    """Mark ``model`` as converted by ``plan``, so that saving it writes the plan."""
    model.kronecker_plan = plan  # type: ignore[assignment]
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from .hf import KroneckerQuantizationConfig

        model.config.quantization_config = KroneckerQuantizationConfig.from_plan(plan)
        untie(model)


def release(model: nn.Module) -> None:
    """Undo `adopt` on a merged copy."""
    if hasattr(model, "kronecker_plan"):
        del model.kronecker_plan
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config
    for module in model.modules():
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            module.__dict__.pop(name, None)
        if hasattr(module, "get_expanded_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def untie(model: nn.Module) -> None:
    """Take converted weights off transformers' lists of tied names: a `KroneckerLMHead` reads its
    embedding itself, and there is no ``weight`` to tie any more."""
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            pairs = getattr(module, attribute, None)
            if isinstance(pairs, Mapping):
                kept = {k: v for k, v in pairs.items() if _present(module, k) and _present(module, v)}
                if len(kept) != len(pairs):
                    setattr(module, attribute, kept)


def _present(model: nn.Module, name: str) -> bool:
    """False only for a parameter name whose module is a Kronecker one without it."""
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return True
    return not isinstance(module, KRONECKER_MODULES) or leaf in module._parameters


def _config(factor, preset, rules, keep, config) -> KroneckerConfig:
    if config is not None:
        if any(given is not None for given in (factor, preset, rules, keep)):
            raise PlanError("config= holds factor, preset, rules and keep; give it alone.")
        return config
    given: dict[str, Any] = {"factor": factor, "preset": preset, "rules": rules or {}}
    if keep is not None:
        given["keep"] = (keep,) if isinstance(keep, str) else tuple(keep)
    return KroneckerConfig(**given)


def _fit(dense: nn.Module, groups) -> tuple[nn.Module, float]:
    if isinstance(dense, nn.Embedding):
        module, error = KroneckerEmbedding.from_embedding(dense, groups)
    elif isinstance(dense, nn.Linear):
        module, error = KroneckerLinear.from_linear(dense, groups)
    else:
        module, error = KroneckerLinear.from_conv1d(dense, groups)
    for parameter in module.parameters():
        parameter.requires_grad_(dense.weight.requires_grad)
    return module, error


def _refuse_converted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, KRONECKER_MODULES):
            raise PlanError(
                f"{name!r} is already a {type(module).__name__}: the model was converted before. "
                "Convert the dense teacher, or kronbert.merge(model) first."
            )


def _check_plan(plan: Plan, sizes: Inventory) -> None:
    known = {layer.name: layer for layer in sizes.layers}
    for layer in plan.layers:
        size = known.get(layer.size.name)
        if size is None or (size.out, size.inner) != (layer.size.out, layer.size.inner):
            found = "no such layer" if size is None else f"a {size.out}x{size.inner} weight"
            raise PlanError(
                f"{layer.size.name!r}: the plan expects a {layer.size.out}x{layer.size.inner} "
                f"weight, the model has {found}. Make the plan from this model."
            )


def _check_weights(model: nn.Module, plan: Plan) -> None:
    """Refuse weights that cannot be read as plain finite floats, before any work is done."""
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "an unknown method")
        raise PlanError(
            f"the model's weights are quantised ({method}). Load it without quantisation, convert, "
            "and quantise the student."
        )
    modules = dict(model.named_modules())
    for layer in plan.converted:
        name, module = layer.size.name, modules[layer.size.name]
        weight = module.weight
        if weight.device.type == "meta":
            raise PlanError(
                f"{name!r}: its weight is on the meta device, there is nothing to decompose. Load "
                "the weights (from_pretrained without a meta device or disk offload)."
            )
        if type(weight.data) not in (torch.Tensor, nn.Parameter) or not weight.is_floating_point():
            raise PlanError(
                f"{name!r}: its weight is a {type(weight.data).__name__} of {weight.dtype}, sharded "
                "or quantised. Convert before sharding or quantising the model."
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise PlanError(
                f"{name!r} carries forward hooks, which a new module would lose. Remove them, or "
                "keep the layer dense."
            )
        if not torch.isfinite(weight).all():
            raise PlanError(
                f"{name!r}: its weight holds NaN or infinity. Use an intact checkpoint, or keep "
                "the layer dense (keep=[its name])."
            )


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _conv1d(module: KroneckerLinear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    linear = module.to_linear()
    conv = Conv1D(module.out_features, module.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    conv.bias = nn.Parameter(conv.bias.detach().to(linear.weight.dtype))
    return conv.train(module.training)
