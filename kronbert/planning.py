"""`Plan`: what becomes of every layer, decided from sizes alone before any weight is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .config import SCHEMA, KroneckerConfig, check_schema
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
    """

    name: str
    kind: Kind
    group: Group
    out: int
    inner: int
    tied_to: str | None = None
    dense_because: str | None = None

    @property
    def weights(self) -> int:
        """Numbers in the weight; 0 for a tied head, whose embedding counts them."""
        return 0 if self.tied_to else self.out * self.inner


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
        """FLOPs per token in the cheaper order; a lookup in a dense table costs none."""
        if self.size.kind in ("embedding", "position") and not self.groups:
            return 0
        if not self.groups:
            return dense_flops(self.size.out, self.size.inner)
        if self.size.kind in ("embedding", "position"):
            return sum(shape.rank * 2 * self.size.inner for shape in self.groups)
        return sum(shape.flops() for shape in self.groups) + self.size.out * (len(self.groups) - 1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of every layer of one model: printable, editable, JSON."""

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
        """Per group: weights before and after, their ratio, and FLOPs per token."""
        view: dict[str, dict[str, float]] = {}
        for layer in self.layers:
            row = view.setdefault(
                layer.size.group, {"layers": 0, "dense": 0, "weights": 0, "factor": 1.0, "flops": 0}
            )
            row["layers"] += 1
            row["dense"] += layer.size.weights
            row["weights"] += layer.weights
            row["flops"] += layer.flops
            row["factor"] = row["dense"] / max(row["weights"], 1)
        return view

    def edit(self, changes: Mapping[str, Any]) -> Plan:
        """A plan with the named layers replaced: name -> anything `Rule.parse` takes."""
        rules = {**self.config.rules, **changes}
        config = replace(self.config, rules=rules)
        known = {layer.size.name: layer for layer in self.layers}
        config.check_names(tuple(known))
        for name in changes:
            if name.startswith("re:"):
                raise PlanError(f"{name!r}: edit takes full names. For patterns, plan with rules=.")
            layer = known[name]
            rule = config.rules[name]
            groups = rule.fixed(layer.size.out, layer.size.inner)
            if groups is None:
                groups = best_under(layer.size, rule.factor or 1.0)
            known[name] = PlannedLayer(size=layer.size, groups=checked(layer.size, groups))
        layers = tuple(known.values())
        return replace(self, layers=_tie_heads(layers), config=config)

    def with_errors(self, errors: Mapping[str, float]) -> Plan:
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
                    "groups": " + ".join(shape.spec for shape in layer.groups),
                    "error": layer.error,
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        known = ("model_type", "dense_parameters", "config", "layers")
        data = check_schema(data, known, "Plan")
        layers = []
        for row in data["layers"]:
            row = dict(row)
            spec = row.pop("groups")
            groups = parse_groups(spec) if spec else ()
            error = row.pop("error", None)
            layers.append(PlannedLayer(size=LayerSize(**row), groups=groups, error=error))
        return cls(
            layers=tuple(layers),
            dense_parameters=data["dense_parameters"],
            config=KroneckerConfig.from_json(data["config"]),
            model_type=data.get("model_type", ""),
        )

    def __str__(self) -> str:
        from .plan_table import render

        return render(self)

    def __rich__(self) -> Any:
        from .plan_table import renderable

        return renderable(self)


def make_plan(inventory: Inventory, config: KroneckerConfig) -> Plan:
    """The plan for the sizes in ``inventory``.

    Raises `NoMatchError` for a rule that names nothing, `ShapeError` for a shape that does not
    divide, `PlanError` for a factor out of reach (it names the largest that is not)."""
    config.check_names([layer.name for layer in inventory.layers])
    fixed: dict[str, Groups] = {}
    free: list[LayerSize] = []
    for layer in inventory.layers:
        if layer.tied_to:
            continue
        rule = config.rule(layer.name)
        if layer.dense_because:
            if rule is not None and not rule.dense and layer.name in config.rules:
                raise PlanError(f"{layer.name!r} cannot be converted: {layer.dense_because}.")
            fixed[layer.name] = ()
        elif rule is not None:
            groups = rule.fixed(layer.out, layer.inner)
            if groups is None:
                groups = best_under(layer, rule.factor or 1.0)
            fixed[layer.name] = groups
        elif config.preset is not None:
            fixed[layer.name] = _preset_groups(layer, config.preset)
        elif config.factor is not None:
            free.append(layer)
        else:
            fixed[layer.name] = ()
    planned = {
        layer.name: PlannedLayer(size=layer, groups=checked(layer, fixed.get(layer.name, ())))
        for layer in inventory.layers
    }
    if config.factor is not None:
        settled = inventory.parameters - sum(layer.weights for layer in free)
        settled -= sum(
            planned[name].size.weights - planned[name].weights for name in fixed if name in planned
        )
        for name, groups in choose(free, settled, inventory.parameters, config.factor).items():
            planned[name] = PlannedLayer(size=planned[name].size, groups=groups)
    plan = Plan(
        layers=_tie_heads(tuple(planned.values())),
        dense_parameters=inventory.parameters,
        config=config,
        model_type=inventory.model_type,
    )
    if not plan.converted:
        raise PlanError(
            "no layer would be converted: every Linear and Embedding is kept dense. "
            "Shorten keep= or the rules."
        )
    return plan


def checked(layer: LayerSize, groups: Groups) -> Groups:
    if groups:
        check_groups(groups, layer.out, layer.inner, repr(layer.name))
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
    return tuple(
        replace(layer, groups=known[layer.size.tied_to].groups) if layer.size.tied_to else layer
        for layer in known.values()
    )
