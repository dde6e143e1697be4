"""Other ways to spend the numbers of a plan: structures of equal size for the studies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kronbert.errors import DataError, near
from kronbert.planning import LayerSize, Plan
from kronbert.row_ranks import FLAT_POWER, SHARED, row_ranks
from kronbert.search import Candidate, pareto, predicted_loss, svd_rank
from kronbert.shapes import Groups, KroneckerShape, divisors, low_rank

Choice = Callable[[LayerSize, int], Groups]
"""Groups of one layer with at most so many numbers; none: it stays as it is."""


def restructured(plan: Plan, name: str) -> Plan:
    """``plan`` with the structure of that name (a key of `STRUCTURES`), at most as large."""
    if name not in STRUCTURES:
        raise DataError(f"structure {name!r}: no such structure. {near(name, list(STRUCTURES))}")
    if name == "planned":
        return plan
    if name == "uniform":
        return uniform(plan)
    kinds, choice = STRUCTURES[name]
    changes = {}
    for layer in plan.converted:
        if layer.size.kind in kinds and not layer.size.tied_to:
            groups = choice(layer.size, layer.weights)
            if groups:
                changes[layer.size.name] = list(groups)
    return _spent(plan.edit(changes), plan.parameters, LINEAR if kinds == TABLE else TABLE)


def _spent(plan: Plan, parameters: int, kinds: tuple[str, ...]) -> Plan:
    """``plan`` with what it leaves of ``parameters`` spent on layers of these kinds, as far as
    their ranks allow: shapes are coarse, and students are compared at one size."""
    left = parameters - plan.parameters
    layers = [one for one in plan.converted if one.size.kind in kinds and not one.size.tied_to]
    share = left // max(1, len(layers))
    changes = {}
    for layer in layers:
        numbers = layer.weights + share
        groups = blocks(layer.size, numbers) if layer.size.kind == "embedding" else ()
        changes[layer.size.name] = list(groups or one_rank(layer.size, numbers))
    return plan.edit(changes)


def uniform(plan: Plan) -> Plan:
    """Every layer and table of the plan the same ratio smaller, in the kind of shape it has."""
    free = [layer for layer in plan.converted if not layer.size.tied_to]

    def at(ratio: float) -> Plan:
        def groups(size: LayerSize) -> Groups:
            numbers = int(size.weights / ratio)
            table = blocks(size, numbers) if size.kind == "embedding" else ()
            return table or (svd_rank(size.out, size.inner, numbers),)

        return plan.edit({layer.size.name: list(groups(layer.size)) for layer in free})

    low, high = 1.0, 4.0 * plan.factor
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if at(middle).parameters > plan.parameters else (low, middle)
    return at(high)


def blocks(
    size: LayerSize, numbers: int, power: float = FLAT_POWER, shared: float = SHARED
) -> Groups:
    """Blocks of rows with ranks of their own; power, shared: see `row_ranks`."""
    fitting = [
        (kept, groups)
        for groups, kept in row_ranks(size.out, size.inner, power, shared)
        if sum(shape.parameters for shape in groups) <= numbers
    ]
    return max(fitting, key=lambda one: one[0])[1] if fitting else ()


def blocks_with(part: float) -> Choice:
    """`blocks` of another size; what that saves or costs, the layers get or pay. One rank more for
    all rows is a twentieth of a small table, so the block of the highest rank takes what is left
    over."""

    def choice(size: LayerSize, numbers: int) -> Groups:
        groups = blocks(size, int(part * numbers))
        if len(groups) < 2:
            return groups
        used = sum(shape.parameters for shape in groups)
        first = max(groups[1:], key=lambda shape: shape.rank)
        more = (int(part * numbers) - used) // (first.a_out + first.b_in)
        rank = min(first.rank + more, size.inner - groups[0].rank)
        return tuple(replace(one, rank=rank) if one is first else one for one in groups)

    return choice


def blocks_by(power: float) -> Choice:
    """`blocks` by this law alone, of the size they have."""
    return lambda size, numbers: blocks(size, numbers, power, shared=0.0)


def one_rank(size: LayerSize, numbers: int) -> Groups:
    """A truncated SVD."""
    return (svd_rank(size.out, size.inner, numbers),)


def single(size: LayerSize, numbers: int) -> Groups:
    """One Kronecker product; a table's has b_out = 1."""
    fitting = [one for one in products(size) if one.weights <= numbers and one.groups]
    return fitting[-1].groups if fitting else ()


def balanced(size: LayerSize, numbers: int) -> Groups:
    """A sum of products whose two matrices are about equally large."""
    found: list[tuple[float, KroneckerShape]] = []
    for a_out in divisors(size.out):
        for a_in in divisors(size.inner):
            shape = KroneckerShape(a_out, a_in, size.out // a_out, size.inner // a_in)
            sides = (shape.a_out, shape.a_in, shape.b_out, shape.b_in)
            uneven = max(sides) / min(sides) + shape.parameters / (2 * shape.full_rank)
            rank = min(numbers // shape.parameters, shape.full_rank)
            if rank:
                found.append((uneven, KroneckerShape(*sides, rank)))
    return (min(found)[1],) if found else ()


def mixed(size: LayerSize, numbers: int) -> Groups:
    """A truncated SVD with about half of the numbers, and one Kronecker product."""
    each = size.out + size.inner
    rank = max(1, numbers // (2 * each))
    product = single(size, numbers - rank * each)
    if not product:
        return ()
    rank = (numbers - product[0].parameters) // each
    return (low_rank(size.out, size.inner, rank), *product)


def products(size: LayerSize) -> list[Candidate]:
    """Single products for one layer, numbers ascending, predicted loss descending. A linear layer's
    keep half of its matrix rank, as KroneckerBERT's do."""
    table, found = size.kind in ("embedding", "position"), []
    for a_out in [size.out] if table else divisors(size.out):
        for a_in in divisors(size.inner):
            shape = KroneckerShape(a_out, a_in, size.out // a_out, size.inner // a_in)
            rank = min(shape.a_out, shape.a_in) * min(shape.b_out, shape.b_in)
            whole = table or 2 * rank >= min(size.out, size.inner)
            if whole and shape.parameters < size.weights:
                loss = predicted_loss(shape, size.weights, table=table)
                found.append(Candidate(shape.parameters, loss, (shape,)))
    return pareto([*found, Candidate(size.weights, 0.0)])


LINEAR, TABLE = ("linear", "conv1d"), ("embedding",)

STRUCTURES: dict[str, tuple[tuple[str, ...], Choice]] = {
    "planned": ((), one_rank),
    "uniform": ((), one_rank),
    "single layers": (LINEAR, single),
    "balanced layers": (LINEAR, balanced),
    "mixed layers": (LINEAR, mixed),
    "one-rank table": (TABLE, one_rank),
    "1 x n table": (TABLE, single),
    "table by i ** -0.75": (TABLE, blocks_by(0.75)),
    "table by i ** -0.5": (TABLE, blocks_by(0.5)),
    "table by i ** -0.25": (TABLE, blocks_by(0.25)),
    "more for all rows": (TABLE, lambda size, numbers: blocks(size, numbers, shared=0.75)),
    "smaller table": (TABLE, blocks_with(0.75)),
    "larger table": (TABLE, blocks_with(1.25)),
}
"""Name -> kinds of layers that change, and to what. "planned": nothing; "uniform": `uniform`."""
