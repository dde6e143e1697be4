"""plan, convert and merge: everything is checked and built before anything is swapped."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from .calibration import calibration_batches
from .config import DEFAULT_KEEP, KroneckerConfig
from .data_init import fit_to_data
from .embedding import KroneckerEmbedding
from .errors import PlanError, ShapeError, expect_model
from .fusion import unfuse
from .head import KroneckerLMHead
from .hooks import check_hooks, renew_input_hooks
from .inventory import inventory, keep_mark, swap
from .linear import KroneckerLinear
from .planning import Inventory, Plan, PlannedLayer, check_rows, make_plan
from .prepared import own_forward, unprepare
from .saved import own_configs, plans_of_parts, saved_parts, warn_of_lenient_loading
from .shapes import check_groups

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

    model_or_config: a model, or a transformers config (no weights needed). factor, preset,
    rules: see `KroneckerConfig`; or give one as ``config``. keep: names that stay dense, patterns
    as there, beside the task's head (an empty list: none, nor that). errors: with a model, fit
    every layer to print its relative error (seconds for BERT-base; False: sizes only)."""
    if isinstance(model_or_config, nn.Module):
        _check_model(model_or_config)
    stored: Any = getattr(model_or_config, "quantization_config", None)
    told = stored if isinstance(stored, Mapping) else vars(stored) if stored else {}
    if told.get("quant_method") == "kronecker":
        raise PlanError(
            "plan: the config is a student's, converted before. Plan the dense teacher; what "
            "became of a student's layers is its kronecker_plan."
        )
    wanted = _config(factor, preset, rules, keep, config)
    made = make_plan(inventory(model_or_config), wanted)
    if not errors or not isinstance(model_or_config, nn.Module):
        return made
    modules = dict(model_or_config.named_modules())
    if any(_weight(modules[layer.size.name]).is_meta for layer in made.converted):
        return made
    _check_weights(model_or_config, made)
    fits = {
        layer.size.name: _fit(modules[layer.size.name], layer)[1]
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
    init: Literal["weights", "data"] = "weights",
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """A student of ``model`` whose planned layers are the nearest sums of Kronecker products.

    The teacher stays untouched (inplace=True reuses its modules instead of copying the dense
    ones). plan: one made, and perhaps edited, before. The student's plan, with the relative error
    of every fit, is its ``kronecker_plan``. Raises before anything is changed.

    init: nearest to what, the weights, or the teacher's outputs on ``calibration``: batches of
    model inputs, dicts of tensors or single ones; positions whose attention_mask is 0 do not count.
    The output errors of both are then the student's ``data_fit``, a `FitReport`."""
    batches = calibration_batches(init, calibration)
    expect_model("convert", model)
    _check_model(model)
    sizes = inventory(model)
    if plan is None:
        plan = make_plan(sizes, _config(factor, preset, rules, keep, config))
    else:
        if any(given is not None for given in (factor, preset, rules, keep, config)):
            raise PlanError("convert(plan=...): the plan fixes every shape; give it alone.")
        if not isinstance(plan, Plan):
            raise PlanError(
                f"convert(plan={type(plan).__name__}): expected a kronbert.Plan. Of its JSON: "
                "kronbert.Plan.from_json(json.loads(Path(...).read_text()))."
            )
        _check_plan(plan, sizes)
        rows = {layer.size.name: layer for layer in plan.layers}
        plan = replace(
            plan,
            layers=tuple(rows.get(x.name, PlannedLayer(size=x)) for x in sizes.layers),
            dense_parameters=sizes.parameters,
            model_type=sizes.model_type,
        )
    _check_weights(model, plan)
    warn_of_lenient_loading(model)
    modules = dict(model.named_modules())
    memo: dict[int, Any] = {}
    errors: dict[str, float] = {}
    new: dict[str, nn.Module] = {}
    for layer in plan.converted:
        name, tied = layer.size.name, layer.size.tied_to
        if tied is None:
            new[name], errors[name] = _fit(modules[name], layer)
    for layer in plan.converted:
        name, tied = layer.size.name, layer.size.tied_to
        if tied is not None:
            table = new[tied]
            assert isinstance(table, KroneckerEmbedding)  # _check_plan and the planner see to it
            new[name] = KroneckerLMHead(table).train(modules[name].training)
        bias = getattr(modules[name], "bias", None)
        if bias is not None:
            # The same Parameter (a head's bias is tied to the model's), or its one copy.
            new[name].bias = bias if inplace else copy.deepcopy(bias, memo)
        keep_mark(modules[name], new[name])
    plan = plan.with_errors(errors)
    stored = plans_of_parts(model, plan)
    with own_forward(model):
        fitted = None if batches is None else fit_to_data(model, new, plan, batches)
    if "" in new:
        student = new[""]
    elif inplace:
        swap(model, new)
        student = model
    else:
        memo.update({id(modules[name]): module for name, module in new.items()})
        student = copy.deepcopy(model, memo)
    unprepare(student)
    renew_input_hooks(student)
    student.kronecker_plan = plan  # type: ignore[assignment]
    if fitted is not None:
        student.data_fit = fitted  # type: ignore[assignment]
    own_configs(student)
    for name, part in saved_parts(student).items():
        if name in stored:
            from .hf import untie

            part.config.quantization_config = stored[name]
            untie(part)
    return student


def merge(model: nn.Module) -> nn.Module:
    """The dense twin of a converted model: the same function, plain modules, no kronbert needed.

    A copy; every weight is multiplied out in float64 and rounded once."""
    expect_model("merge", model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, KRONECKER_MODULES)}
    if not found:
        raise PlanError("merge: the model holds no Kronecker layer. Give the converted student.")
    for name, module in found.items():
        check_hooks(name, module)
    memo: dict[int, Any] = {}
    new: dict[str, nn.Module] = {}
    tables: dict[int, nn.Embedding] = {}
    for name, module in found.items():
        if isinstance(module, KroneckerEmbedding):
            new[name] = tables[id(module)] = module.to_embedding()
    for name, module in found.items():
        if isinstance(module, KroneckerLinear):
            new[name] = module.to_conv1d() if module.conv1d else module.to_linear()
        elif isinstance(module, KroneckerLMHead):
            if id(module.table) not in tables:
                raise PlanError(
                    f"merge: {name!r} is tied to an embedding outside the model. Merge the whole "
                    "model."
                )
            new[name] = module.to_linear(tables[id(module.table)])
        bias = getattr(module, "bias", None)
        if bias is not None:
            new[name].bias = copy.deepcopy(bias, memo)
        keep_mark(module, new[name])
    if "" in new:
        return new[""]
    memo.update({id(found[name]): module for name, module in new.items()})
    dense = unfuse(copy.deepcopy(model, memo))
    unprepare(dense)
    renew_input_hooks(dense)
    for name in ("kronecker_plan", "data_fit"):
        dense.__dict__.pop(name, None)
    for part in saved_parts(dense).values():
        from .hf import release

        release(part)
    return dense


def _config(
    factor: float | None,
    preset: str | None,
    rules: Mapping[str, Any] | None,
    keep: Sequence[str] | None,
    config: KroneckerConfig | None,
) -> KroneckerConfig:
    if config is not None:
        if any(given is not None for given in (factor, preset, rules, keep)):
            raise PlanError("config= holds factor, preset, rules and keep; give it alone.")
        if not isinstance(config, KroneckerConfig):
            raise PlanError(
                f"config={type(config).__name__}: expected a kronbert.KroneckerConfig, such as "
                "KroneckerConfig(factor=8). A model, or its own config, comes first."
            )
        return config
    given: dict[str, Any] = {"factor": factor, "preset": preset, "rules": rules or {}}
    if keep is not None:
        several = isinstance(keep, Iterable) and not isinstance(keep, str)
        own = tuple(keep) if several else (keep,)
        plain = own and all(isinstance(pattern, str) for pattern in own)
        given["keep"] = (*DEFAULT_KEEP, *own) if plain else own
    return KroneckerConfig(**given)


def _fit(dense: nn.Module, layer: PlannedLayer) -> tuple[nn.Module, float]:
    groups = layer.groups
    table = isinstance(dense, nn.Embedding)
    check_groups(groups, layer.size.out, layer.size.inner, repr(layer.size.name), table=table)
    if isinstance(dense, nn.Embedding):
        try:
            return KroneckerEmbedding.from_embedding(dense, groups)
        except ShapeError as error:
            raise ShapeError(f"{layer.size.name!r}: {error}") from None
    if isinstance(dense, nn.Linear):
        return KroneckerLinear.from_linear(dense, groups)
    assert isinstance(dense, Conv1D)  # the inventory lists nothing else
    return KroneckerLinear.from_conv1d(dense, groups)


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)  # the inventory lists nothing else
    return weight


def _check_model(model: nn.Module) -> None:
    """Refuse a model that was converted before, or is wrapped by something that knows its names."""
    inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if inner == "_orig_mod" or isinstance(model, parallel):
        raise PlanError(
            f"the model is wrapped in a {type(model).__name__}. Convert model.{inner}, and wrap "
            "the student."
        )
    for name, module in model.named_modules():
        if isinstance(module, KRONECKER_MODULES):
            raise PlanError(
                f"{name!r} is already a {type(module).__name__}: the model was converted before. "
                "Convert the dense teacher, or kronbert.merge(model) first."
            )
        home = type(module).__module__
        if home.startswith("peft."):
            raise PlanError(
                f"{name!r} is a {type(module).__name__} of PEFT, whose adapters no student keeps. "
                "Convert what model.merge_and_unload() gives."
            )
        if home.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise PlanError(
                f"{name!r} is quantised ({type(module).__name__}). Convert the model before "
                "quantising it, and quantise the student."
            )


def _check_plan(plan: Plan, sizes: Inventory) -> None:
    if not plan.converted:
        raise PlanError("convert(plan=...): no layer of the plan would be converted. Edit it.")
    known = {layer.name: layer for layer in sizes.layers}
    check_rows(plan.layers)
    converted = {layer.size.name for layer in plan.converted}
    for layer in plan.layers:
        name, size = layer.size.name, known.get(layer.size.name)
        if size is None or (size.out, size.inner) != (layer.size.out, layer.size.inner):
            found = "no such layer" if size is None else f"a {size.out}x{size.inner} weight"
            raise PlanError(
                f"{name!r}: the plan expects a {layer.size.out}x{layer.size.inner} "
                f"weight, the model has {found}. Make the plan from this model."
            )
        if size.tied_to != layer.size.tied_to or (size.kind != layer.size.kind):
            raise PlanError(
                f"{name!r}: the plan expects {_described(layer.size.kind, layer.size.tied_to)}, "
                f"the model has {_described(size.kind, size.tied_to)}. Make the plan from this "
                "model."
            )
        if layer.groups and size.dense_because:
            raise PlanError(f"{name!r} cannot be converted: {size.dense_because}.")
    for size in sizes.layers:  # the plan may lack its row
        if size.tied_to and (size.tied_to in converted) != (size.name in converted):
            raise PlanError(
                f"{size.name!r} shares its weight with {size.tied_to!r}: expected shapes for both "
                "or neither. Edit the embedding; its head follows."
            )


def _described(kind: str, tied_to: str | None) -> str:
    return f"a layer of kind {kind!r}" + (f" tied to {tied_to!r}" if tied_to else "")


def _check_weights(model: nn.Module, plan: Plan) -> None:
    """Refuse weights that cannot be read as plain finite floats, before any work is done."""
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "an unknown method")
        raise PlanError(
            f"the model's weights are quantised ({method}). Load it without quantisation, convert, "
            "and quantise the student."
        )
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            rule = plan.config.rule(name)
            if parametrize.is_parametrized(module) and not (rule and rule.dense):
                raise PlanError(
                    f"{name!r}: its weight is parametrised. Remove the parametrisation "
                    "(torch.nn.utils.parametrize.remove_parametrizations) before converting."
                )
    for layer in plan.converted:
        name = layer.size.name
        _check_module(name, modules[name])


def _check_module(name: str, module: nn.Module) -> None:
    weight = _weight(module)
    if weight.device.type == "meta":
        raise PlanError(
            f"{name!r}: its weight is on the meta device, there is nothing to decompose. Load "
            "the weights (from_pretrained without a meta device or disk offload)."
        )
    plain = type(weight.data) in (torch.Tensor, nn.Parameter)
    if not plain or not weight.is_floating_point():
        raise PlanError(
            f"{name!r}: its weight is a {type(weight.data).__name__} of {weight.dtype}, "
            "sharded or quantised. Convert before sharding or quantising the model."
        )
    check_hooks(name, module)
    if not torch.isfinite(weight).all():
        raise PlanError(
            f"{name!r}: its weight holds NaN or infinity. Use an intact checkpoint, or keep "
            "the layer dense (keep=[its name])."
        )
