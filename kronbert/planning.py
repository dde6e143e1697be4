"""`Plan`: what becomes of every layer, decided from sizes alone before any weight is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from .config import SCHEMA, KroneckerConfig, Rule, check_schema
from .errors import PlanError
from .presets import preset as find_preset
from .search import best_under, choose
from .shapes import Groups, check_groups, dense_flops, parse_groups

Kind = Literal["linear", "conv1d", "embedding", "position", "head"]
Group = Literal["embedding", "attention", "feed-forward", "other"]


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """One Linear, Conv1D or Embedding of a model: its full name and the sizes of its weight.

    out, inner: weight (out, inner) as `nn.Linear` stores it; an embedding is (vocabulary, width).
    tied_to: the embedding whose weight a head shares. dense_because: why it cannot be converted.
    counted: False where another layer, of no head, has the same weight and counts it.
    """

    name: str
    kind: Kind
    group: Group
    out: int
    inner: int
    tied_to: str | None = None
    dense_because: str | None = None
    counted: bool = True

    @property
    def weights(self) -> int:
        """Numbers in the weight; 0 where another layer counts them, a tied head's embedding say."""
        return self.out * self.inner if self.counted and not self.tied_to else 0


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The convertible layers of a model and its parameter count, tied weights counted once."""

    layers: tuple[LayerSize, ...]
    parameters: int
    model_type: str = ""


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """A layer and the groups that replace its weight; none: it stays dense.

    error: relative Frobenius error ||W - sum a ⊗ b|| / ||W|| of the fit, when weights were given.
    """

    size: LayerSize
    groups: Groups = ()
    error: float | None = None

    @property
    def weights(self) -> int:
        if self.size.tied_to:
            return 0
        return sum(shape.parameters for shape in self.groups) or self.size.weights

    @property
    def flops(self) -> int:
        """FLOPs per token in the cheaper order; a lookup in a dense table costs none.

        One in a table with blocks of rows counts every block, as compiled code and GPUs pay it;
        on a CPU, in eager mode, a word pays only for blocks that it lies in."""
        if self.size.kind in ("embedding", "position") and not self.groups:
            return 0
        if not self.groups:
            return dense_flops(self.size.out, self.size.inner)
        if self.size.kind in ("embedding", "position"):
            return sum(shape.rank * 2 * self.size.inner for shape in self.groups)
        added = sum(shape.out_features for shape in self.groups[1:])
        return sum(shape.flops() for shape in self.groups) + added


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of every layer of one model: printable, editable, JSON.

    dense_parameters: of the whole model before, tied weights counted once."""

    layers: tuple[PlannedLayer, ...]
    dense_parameters: int
    config: KroneckerConfig
    model_type: str = ""

    @property
    def parameters(self) -> int:
        """Parameters of the whole converted model, tied weights counted once."""
        saved = sum(layer.size.weights - layer.weights for layer in self.layers)
        return self.dense_parameters - saved

    @property
    def factor(self) -> float:
        """Compression ratio, parameters of the whole model before / after."""
        return self.dense_parameters / self.parameters

    @property
    def converted(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.groups)

    def linear_flops(self, sequence_length: int = 128, *, dense: bool = False) -> int:
        """FLOPs of the attention and feed-forward matrices for one sequence, as the papers count:
        no attention products, embeddings, pooler or head (Tahaei et al. 2022, Table 1)."""
        per_token = sum(
            dense_flops(layer.size.out, layer.size.inner) if dense else layer.flops
            for layer in self.layers
            if layer.size.group in ("attention", "feed-forward")
        )
        return per_token * sequence_length

    def by_group(self) -> dict[str, dict[str, float]]:
        """Per group: layers, weights before ("dense") and after, their ratio ("factor"), and FLOPs
        per token before ("dense_flops") and after."""
        view: dict[str, dict[str, float]] = {}
        for group in dict.fromkeys(layer.size.group for layer in self.layers):
            layers = [layer for layer in self.layers if layer.size.group == group]
            dense = sum(layer.size.weights for layer in layers)
            weights = sum(layer.weights for layer in layers)
            view[group] = {
                "layers": len(layers),
                "dense": dense,
                "weights": weights,
                "factor": dense / weights if weights else 1.0,
                "dense_flops": sum(PlannedLayer(size=layer.size).flops for layer in layers),
                "flops": sum(layer.flops for layer in layers),
            }
        return view

    def edit(self, changes: Mapping[str, Any]) -> Plan:
        """A plan with the named layers replaced: name -> anything `Rule.parse` takes.

        The other layers stay as they are, so the factor may change. Raises as `make_plan` does."""
        if not isinstance(changes, Mapping):
            raise PlanError(
                f"edit({changes!r}): expected names with what becomes of the layers, for example "
                "{'pooler.dense': 'dense'}."
            )
        config = replace(self.config, rules={**self.config.rules, **changes})
        known = {layer.size.name: layer for layer in self.layers}
        for name in changes:
            if name.startswith("re:"):
                raise PlanError(f"{name!r}: edit takes full names. For patterns, plan with rules=.")
        if changes:
            KroneckerConfig(rules=changes).check_names(tuple(known))
        for name in changes:
            size = known[name].size
            known[name] = PlannedLayer(size=size, groups=ruled(size, config.rules[name]))
        return replace(self, layers=_tie_heads(known.values()), config=config)

    def with_errors(self, errors: Mapping[str, float]) -> Plan:
        """The same plan with the relative error of every fit: full name -> error."""
        layers = (replace(layer, error=errors.get(layer.size.name)) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model_type": self.model_type,
            "dense_parameters": self.dense_parameters,
            "config": self.config.to_json(),
            "layers": [
                {
                    "name": layer.size.name,
                    "kind": layer.size.kind,
                    "group": layer.size.group,
                    "out": layer.size.out,
                    "inner": layer.size.inner,
                    "tied_to": layer.size.tied_to,
                    "dense_because": layer.size.dense_because,
                    "counted": layer.size.counted,
                    "groups": " + ".join(shape.spec for shape in layer.groups),
                    "error": layer.error,
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """From `to_json`; `PlanError` for missing or unknown keys, values of another type or a
        newer schema, `ShapeError` for groups that do not make their layer's weight."""
        known = ("model_type", "dense_parameters", "config", "layers")
        data = check_schema(data, known, "Plan")
        _need(data, {"dense_parameters": int, "config": Mapping, "layers": Sequence}, "Plan")
        _may(data, {"model_type": str}, "Plan")
        layers = tuple(_layer_from_json(row) for row in data["layers"])
        check_rows(layers)
        if data["dense_parameters"] < (least := sum(layer.size.weights for layer in layers)):
            raise PlanError(
                f"Plan: dense_parameters {data['dense_parameters']}: expected at least {least}, "
                "those of its layers' weights. Write the file with to_json."
            )
        return cls(
            layers=layers,
            dense_parameters=data["dense_parameters"],
            config=KroneckerConfig.from_json(data["config"]),
            model_type=data.get("model_type", ""),
        )

    def __str__(self) -> str:
        from .plan_table import render

        return render(self)

    def __rich__(self) -> Any:
        from .plan_table import Renderable

        return Renderable(self)


def make_plan(inventory: Inventory, config: KroneckerConfig) -> Plan:
    """The plan for the sizes in ``inventory``.

    A rule for one layer beats what its size would get; a ``re:`` pattern passes over layers that
    cannot be converted. Raises `NoMatchError` for a rule that names nothing, `ShapeError` for a
    shape that does not divide, `PlanError` for a rule on a layer that cannot be converted and for a
    factor out of reach (it names the largest that is not)."""
    config.check_names([layer.name for layer in inventory.layers])
    planned: dict[str, PlannedLayer] = {}
    free: list[LayerSize] = []
    for layer in inventory.layers:
        groups: Groups = ()
        rule = config.rule(layer.name)
        if layer.name in config.rules:
            groups = ruled(layer, config.rules[layer.name])
        elif layer.dense_because or layer.tied_to:
            pass
        elif rule is not None:
            groups = ruled(layer, rule)
        elif config.preset is not None:
            groups = _preset_groups(layer, config.preset)
        elif config.factor is not None:
            free.append(layer)
        planned[layer.name] = PlannedLayer(size=layer, groups=groups)
    if config.factor is not None:
        saved = sum(layer.size.weights - layer.weights for layer in planned.values())
        settled = inventory.parameters - saved - sum(layer.weights for layer in free)
        try:
            chosen = choose(free, settled, inventory.parameters, config.factor)
        except PlanError as error:
            raise PlanError(f"{error}{_stuck(inventory)}") from None
        for name, groups in chosen.items():
            planned[name] = replace(planned[name], groups=groups)
    plan = Plan(
        layers=_tie_heads(planned.values()),
        dense_parameters=inventory.parameters,
        config=config,
        model_type=inventory.model_type,
    )
    for made in plan.converted:
        table = made.size.tied_to
        if table and config.keeps_alone(made.size.name, table):
            ruled(made.size, Rule(dense=True))  # which refuses
    if not plan.converted:
        raise PlanError(
            "no layer would be converted: every Linear and Embedding is kept dense. "
            "Shorten keep= or the rules."
        )
    return plan


def _stuck(inventory: Inventory) -> str:
    """The largest layer that cannot be converted, where it is a large part of the model."""
    stuck = [layer for layer in inventory.layers if layer.dense_because]
    largest = max(stuck, key=lambda layer: layer.weights, default=None)
    if largest is None or largest.weights < 0.05 * inventory.parameters:
        return ""
    return (
        f" {largest.name!r}, with {largest.weights:,} parameters, cannot be converted: "
        f"{largest.dense_because}."
    )


def ruled(layer: LayerSize, rule: Rule) -> Groups:
    """The groups ``rule`` gives this layer, checked against its sizes."""
    if layer.tied_to:
        raise PlanError(
            f"{layer.name!r} shares its weight with {layer.tied_to!r} and follows it. Give the "
            "rule, or the name to keep, of that one."
        )
    if layer.dense_because and not rule.dense:
        raise PlanError(
            f"{layer.name!r} cannot be converted: {layer.dense_because}. Take it out of the rules."
        )
    groups = rule.fixed(layer.out, layer.inner)
    if groups is None:
        return best_under(layer, rule.factor or 1.0)
    return checked(layer, groups)


def checked(layer: LayerSize, groups: Groups) -> Groups:
    """``groups``, or `ShapeError` with the layer's name when they do not make its weight."""
    if groups:
        # A tied head has its embedding's groups.
        table = layer.kind in ("embedding", "position") or layer.tied_to is not None
        check_groups(groups, layer.out, layer.inner, repr(layer.name), table=table)
    return groups


def _preset_groups(layer: LayerSize, name: str) -> Groups:
    """Presets cover attention, feed-forward and the word embedding; the rest stays dense."""
    table = find_preset(name)
    where = f"{layer.name!r} (preset {name!r})"
    if layer.kind == "embedding":
        return (table.embedding.shape(layer.out, layer.inner, where),)
    if layer.group == "attention":
        return (table.attention.shape(layer.out, layer.inner, where),)
    if layer.group == "feed-forward":
        small = table.expand if layer.out >= layer.inner else table.contract
        return (small.shape(layer.out, layer.inner, where),)
    return ()


def _tie_heads(layers: Iterable[PlannedLayer]) -> tuple[PlannedLayer, ...]:
    """A tied head follows its embedding: same groups, or dense with it."""
    known = {layer.size.name: layer for layer in layers}
    groups = {name: layer.groups for name, layer in known.items()}
    return tuple(
        replace(layer, groups=groups.get(layer.size.tied_to, ())) if layer.size.tied_to else layer
        for layer in known.values()
    )


def _layer_from_json(row: Mapping[str, Any]) -> PlannedLayer:
    sizes = [field.name for field in fields(LayerSize)]
    row = check_schema(row, (*sizes, "groups", "error"), "Plan layer")
    _need(row, {"name": str}, "Plan layer")
    where = f"Plan layer {row['name']!r}"
    _need(row, {"kind": str, "group": str, "out": int, "inner": int, "groups": str}, where)
    for key, choices in (("kind", get_args(Kind)), ("group", get_args(Group))):
        if row[key] not in choices:
            raise PlanError(f"{where}: {key} {row[key]!r}: expected one of {', '.join(choices)}.")
    _may(row, {"tied_to": str, "dense_because": str, "counted": bool, "error": float}, where)
    size = LayerSize(**{key: row[key] for key in sizes if key in row})
    groups = checked(size, parse_groups(row["groups"]) if row["groups"] else ())
    return PlannedLayer(size=size, groups=groups, error=row.get("error"))


def check_rows(layers: Iterable[PlannedLayer]) -> None:
    """Raise `PlanError` where two rows are of one layer."""
    rows = Counter(layer.size.name for layer in layers)
    if twice := [name for name, count in rows.items() if count > 1]:
        raise PlanError(f"{twice[0]!r}: the plan has two rows for it, expected one. Remove one.")


_SAID = {int: "a whole number > 0", float: "a number", str: "text", bool: "true or false"}
_NULL = ("tied_to", "dense_because", "error")


def _need(data: Mapping[str, Any], types: Mapping[str, type], where: str) -> None:
    for key, wanted in types.items():
        if key not in data:
            raise PlanError(f"{where}: key {key!r} is missing. Write the file with to_json.")
        if not _is(data[key], wanted):
            said = _SAID.get(wanted, "what to_json writes")
            raise PlanError(f"{where}: {key} {data[key]!r}: expected {said}.")


def _may(data: Mapping[str, Any], types: Mapping[str, type], where: str) -> None:
    """As `_need`, of keys that may be missing, some of them null."""
    for key, wanted in types.items():
        null = key in _NULL
        if key in data and not (_is(data[key], wanted) or (null and data[key] is None)):
            said = _SAID[wanted] + " or null" * null
            raise PlanError(f"{where}: {key} {data[key]!r}: expected {said}.")


def _is(value: Any, wanted: type) -> bool:
    """JSON's types: true is no number, 2 is one with or without a point; sizes are above 0."""
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    if wanted is float:
        return isinstance(value, int | float)
    if wanted is int:
        return isinstance(value, int) and value > 0
    return isinstance(value, wanted)
