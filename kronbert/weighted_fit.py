"""The sum of Kronecker products whose outputs are nearest, on given inputs: pure linear algebra.

For targets y and inputs x, E||y - Ŵ x||² is, up to a constant, <Ŵ M - 2 C, Ŵ> with M = E x xᵀ and
C = E y xᵀ; its free minimum is T = C M⁻¹. A low-rank group has a closed form (reduced-rank
regression: the leading singular pairs of T M^½). For other shapes the error is quadratic in a for
a given b, and in b for a given a: alternating exact steps never increase it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .decompose import nearest_kronecker, rearranged
from .errors import ShapeError
from .reference import kron_weight
from .shapes import KroneckerShape, partial

Pair = tuple[Tensor, Tensor]
"""One group's a (rank, a_out, a_in) and b (rank, b_out, b_in), float64."""

NEARLY_SINGULAR = 1e-10
"""Added to the normal equations, as a share of their mean diagonal, and pulling to the step before:
terms that lie along one another make them singular."""


@dataclass(frozen=True)
class Objective:
    """<Ŵ gram - 2 cross, Ŵ> for weights Ŵ (out, in): gram (in, in), cross (out, in), float64."""

    gram: Tensor
    cross: Tensor

    def ridged(self, weight: Tensor, share: float) -> Objective:
        """With ``share`` of gram's mean diagonal times ||Ŵ - weight||² on top.

        Directions that the inputs do not reach then stay those of ``weight`` (out, in)."""
        # An input that is zero everywhere leaves the ridge alone.
        scale = self.gram.diagonal().mean().item() * share or 1.0
        eye = torch.eye(self.gram.shape[0], dtype=self.gram.dtype, device=self.gram.device)
        return Objective(self.gram + scale * eye, self.cross + scale * weight)

    def value(self, weight: Tensor) -> float:
        return ((weight @ self.gram - 2 * self.cross) * weight).sum().item()

    def without(self, weight: Tensor) -> Objective:
        """The same for what is added to ``weight`` (up to a constant)."""
        return Objective(self.gram, self.cross - weight @ self.gram)


@torch.no_grad()
def nearest_outputs(
    objective: Objective,
    groups: Sequence[KroneckerShape],
    start: Sequence[Pair],
    *,
    sweeps: int = 20,
    enough: float = 1e-4,
) -> list[Pair]:
    """The groups that minimise ``objective``, terms orthogonal and balanced (see `balanced`).

    One low-rank group: the optimum. Else alternating steps from the lowest of ``start`` and of two
    fits to the free minimum, never above it; at most ``sweeps``, until one gains less than
    ``enough`` of what is left above the free minimum."""
    root = torch.linalg.cholesky(objective.gram)
    if len(groups) == 1 and groups[0].low_rank:
        return [balanced(*low_rank_step(objective, root, groups[0].rank))]
    free = torch.cholesky_solve(objective.cross.T, root).T
    # <T M - 2 C, T>, with T M = C.
    floor = -(objective.cross * free).sum().item()
    pairs, before = _best_start(objective, groups, start, free)
    steps = [None if shape.low_rank else AlternatingStep(objective.gram, shape) for shape in groups]
    rest = objective
    for _ in range(sweeps):
        value = before
        for i, (shape, step) in enumerate(zip(groups, steps, strict=True)):
            if len(groups) > 1:
                rest = objective.without(sum_of(pairs[:i] + pairs[i + 1 :]))
            if step is None:
                pairs[i] = low_rank_step(rest, root, shape.rank)
            else:
                cross = rearranged(rest.cross, shape)
                a, _ = step.a(cross, *pairs[i])
                b, value = step.b(cross, a, pairs[i][1])
                pairs[i] = a, b
        if len(groups) > 1:
            value = objective.value(sum_of(pairs))
        if before - value <= enough * (before - floor):
            break
        before = value
    return [balanced(*pair) for pair in pairs]


def low_rank_step(objective: Objective, root: Tensor, rank: int) -> Pair:
    """The best group of rank ``rank``: a (rank, out, 1), b (rank, 1, in). root: gram's Cholesky
    factor."""
    out, inner = objective.cross.shape
    # (T root)ᵀ, whose leading singular pairs are wanted: their Gram matrix on the smaller side.
    half = torch.linalg.solve_triangular(root, objective.cross.T, upper=False)
    count = min(rank, out, inner)
    if out <= inner:
        left = leading(half.T @ half, count)
        right = half @ left
    else:
        right = leading(half @ half.T, count)
        left = half.T @ right
    right = torch.linalg.solve_triangular(root.T, right, upper=True)
    spare = (0, rank - count)
    left, right = (torch.nn.functional.pad(terms, spare) for terms in (left, right))
    return left.T[:, :, None].contiguous(), right.T[:, None, :].contiguous()


def leading(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors of the ``count`` largest eigenvalues as columns, descending."""
    return torch.linalg.eigh(gram)[1][:, -count:].flip(1)


class AlternatingStep:
    """Exact steps of one group's a and b. The rows of a (of b) share one system of rank * a_in
    (rank * b_in) unknowns each."""

    def __init__(self, gram: Tensor, shape: KroneckerShape) -> None:
        square = KroneckerShape(shape.a_in, shape.a_in, shape.b_in, shape.b_in)
        self._gram = rearranged(gram, square)
        """(a_in a_in, b_in b_in)"""

    def a(self, cross: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
        """The best a for this b, and the objective's value there. cross: `rearranged`, (a_out a_in,
        b_out b_in)."""
        return _step(self._gram, cross, a, b)

    def b(self, cross: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
        """The best b for this a, and the value."""
        return _step(self._gram.T, cross.T, b, a)


def _step(gram: Tensor, cross: Tensor, moved: Tensor, fixed: Tensor) -> tuple[Tensor, float]:
    """The best ``moved`` (rank, out, in) for ``fixed`` (rank, o, i), and the value: gram
    (in in, i i), cross (out in, o i)."""
    rank, out, inner = moved.shape
    columns = rearrange(fixed, "r o i -> o (r i)")
    inner_products = rearrange(columns.T @ columns, "(r i) (s j) -> (i j) (r s)", r=rank, s=rank)
    system = rearrange(
        gram @ inner_products, "(i j) (r s) -> (r i) (s j)", i=inner, j=inner, r=rank, s=rank
    )
    wanted = rearrange(cross @ fixed.flatten(1).T, "(o i) r -> (r i) o", o=out)
    old = rearrange(moved, "r o i -> (r i) o")
    pull = system.diagonal().mean() * NEARLY_SINGULAR
    if not pull > 0:  # fixed is zero: so is the product, whatever this is
        return moved, 0.0
    shift = torch.eye(system.shape[0], dtype=system.dtype, device=system.device) * pull
    new = torch.cholesky_solve(wanted + pull * old, torch.linalg.cholesky(system + shift))
    value = ((system @ new - 2 * wanted) * new).sum().item()
    return rearrange(new, "(r i) o -> r o i", r=rank).contiguous(), value


def balanced(a: Tensor, b: Tensor) -> Pair:
    """The same sum with orthogonal terms, of falling size, whose a and b have equal norms.

    As `nearest_kronecker` leaves them: singular pairs of the rearranged weight."""
    left, left_root = torch.linalg.qr(a.flatten(1).T)
    right, right_root = torch.linalg.qr(b.flatten(1).T)
    u, sigma, v = torch.linalg.svd(left_root @ right_root.T)
    spare = a.shape[0] - sigma.shape[0]
    root = sigma.sqrt()
    left, right = left @ (u[:, : len(root)] * root), right @ (v[: len(root)].T * root)
    left, right = (torch.nn.functional.pad(terms, (0, spare)) for terms in (left, right))
    return left.T.reshape(a.shape).contiguous(), right.T.reshape(b.shape).contiguous()


def _best_start(
    objective: Objective, groups: Sequence[KroneckerShape], start: Sequence[Pair], free: Tensor
) -> tuple[list[Pair], float]:
    """The lowest, and its value, of: ``start``; the groups nearest to the free minimum; for one
    group, nearest in the norm of the Kronecker product that stands for gram, where the nearest sum
    is exact."""
    a, b, _ = nearest_kronecker(free, groups)
    starts = [list(start), list(zip(a, b, strict=True))]
    if len(groups) == 1:
        starts.append([_separable_start(objective.gram, free, groups[0])])
    values = [objective.value(sum_of(pairs)) for pairs in starts]
    best = min(range(len(starts)), key=values.__getitem__)
    return starts[best], values[best]


def _separable_start(gram: Tensor, free: Tensor, shape: KroneckerShape) -> Pair:
    blocks = gram.reshape(shape.a_in, shape.b_in, shape.a_in, shape.b_in)
    roots = []
    for side in ("i j k j -> i k", "i j i l -> j l"):
        part = torch.einsum(side.replace(" ", ""), blocks)
        roots.append(torch.linalg.cholesky(part / part.diagonal().mean()))
    scaled = free @ torch.kron(*roots)
    (a,), (b,), _ = nearest_kronecker(scaled, shape)
    a, b = (
        torch.linalg.solve_triangular(root.T, terms.mT, upper=True).mT
        for root, terms in zip(roots, (a, b), strict=True)
    )
    return a, b


def sum_of(pairs: Sequence[Pair]) -> Tensor:
    """The weight (out, in) that the groups make."""
    return kron_weight([a for a, _ in pairs], [b for _, b in pairs])


@torch.no_grad()
def nearest_rows(
    table: Tensor, weights: Tensor, groups: Sequence[KroneckerShape], *, sweeps: int = 12
) -> list[Pair]:
    """The groups nearest to ``table`` (rows, width), row v counting weights[v] > 0 times.

    Every group needs b_out = 1. One group: the optimum, b from the weighted Gram matrix and each
    row of a by projection. Several: alternating, each on what the others leave, from the better of
    two starts, so never above the first group alone: from empty groups, where the first time a
    group looks at all of its rows, or only at those that no later block of rows makes as well.
    a (rank, rows, a_in), b (rank, 1, b_in), float64, terms as `balanced`."""
    weights = weights.double()
    pairs, rest = _first_sweep(table, [weights] * len(groups), groups)
    if any(partial(shape, len(table)) for shape in groups):
        own = _first_sweep(table, _own_weights(weights, groups), groups)
        pairs, rest = min((pairs, rest), own, key=lambda one: weights @ one[1].square().sum(1))
    for _ in range(sweeps - 1 if len(groups) > 1 else 0):
        for i, shape in enumerate(groups):
            place = _rows_of(shape)
            rest[place] += kron_weight(*pairs[i])
            pairs[i] = _row_step(rest[place], weights[place], shape)
            rest[place] -= kron_weight(*pairs[i])
    return [balanced(*pair) for pair in pairs]


def _first_sweep(
    table: Tensor, weights: Sequence[Tensor], groups: Sequence[KroneckerShape]
) -> tuple[list[Pair], Tensor]:
    """Each group, by its own weights of the rows, on what those before it leave; what all leave."""
    rest = table.double().clone()
    pairs = []
    for shape, counts in zip(groups, weights, strict=True):
        place = _rows_of(shape)
        pairs.append(_row_step(rest[place], counts[place], shape))
        rest[place] -= kron_weight(*pairs[-1])
    return pairs, rest


def _own_weights(weights: Tensor, groups: Sequence[KroneckerShape]) -> list[Tensor]:
    """For each group 0 on the rows of later blocks; where that leaves none of its rows, all."""
    found = []
    for i, shape in enumerate(groups):
        own = weights.clone()
        for later in groups[i + 1 :]:
            if partial(later, len(weights)):
                own[_rows_of(later)] = 0
        found.append(own if own[_rows_of(shape)].any() else weights)
    return found


def _rows_of(shape: KroneckerShape) -> slice:
    return slice(shape.start, shape.start + shape.out_features)


def nearest_blocks(table: Tensor, groups: Sequence[KroneckerShape]) -> tuple[list[Pair], float]:
    """`nearest_rows` with all rows alike, in table's dtype, and the relative error
    ||W - sum a ⊗ b|| / ||W||."""
    if any(shape.b_out != 1 for shape in groups):
        raise ShapeError(
            f"{' + '.join(map(str, groups))}: to fit a table with blocks of rows every group needs "
            "b_out = 1. Change those that have not, or let every group make all rows."
        )
    if not torch.isfinite(table).all():
        raise ShapeError(
            "nearest_blocks: the table holds NaN or infinity, expected finite numbers. Use an "
            "intact checkpoint, or keep the layer dense."
        )
    pairs = nearest_rows(table, table.new_ones(len(table)), groups)
    rest = table.double().clone()  # a float64 table would be written to
    for pair, shape in zip(pairs, groups, strict=True):
        rest[_rows_of(shape)] -= kron_weight(*pair)
    error = float(rest.norm() / (table.double().norm() or 1.0))
    return [(a.to(table.dtype), b.to(table.dtype)) for a, b in pairs], error


def _row_step(rest: Tensor, weights: Tensor, shape: KroneckerShape) -> Pair:
    blocks = rest.reshape(-1, shape.b_in)
    count = weights.double().repeat_interleave(shape.a_in)[:, None]
    columns = leading(blocks.T @ (count * blocks), min(shape.rank, shape.b_in))
    columns = torch.nn.functional.pad(columns, (0, shape.rank - columns.shape[1]))
    a = rearrange(blocks @ columns, "(v i) r -> r v i", i=shape.a_in).contiguous()
    return a, columns.T[:, None, :].contiguous()
