"""The search for shapes: candidates of each layer, their predicted loss, the best mix in a budget.

Predicted loss of a layer = -log(predicted part of its output that is kept) + what it costs to run;
summed over layers it is the log of what a whole pass keeps. The law was fitted to one MiniLM-L6
that was fine-tuned on SST-2 (384 wide; layer 3 fitted to its inputs, the table to its weights).
Mean of -log(1 - squared relative error) over query, value, attention output and the wide matrix at
4 and 16 times compression, and the squared error of the table at 2, 4, 8 and 16:

    one large matrix beside 2x2, 4x4 (full rank 4, 16)   0.38  0.88
    balanced sum of 24x24 ⊗ 16x16 (full rank 256)        0.24  0.64
    truncated SVD                                        0.16  0.47
    word embedding, truncated SVD                        0.21  0.43  0.62  0.77
    word embedding, ``1 x n`` Kronecker                  0.50  0.75  0.87  0.93

The fifth matrix, 1536 -> 384, lost half as much and has no balanced fit at 4: it sets the level of
the law (mean over five: 0.32 and 0.75) only. It ranks shapes before any training; it is no
forecast of a score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .errors import PlanError
from .row_ranks import row_ranks
from .shapes import Groups, KroneckerShape, dense_flops, divisors, low_rank

if TYPE_CHECKING:
    from .planning import LayerSize

RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Terms of one sum; more than 16 small products run slower than the dense layer."""

KEPT_RANK = 1 / 2
"""A linear layer keeps at least this part of its matrix rank, as K21's feed-forward does (384 of
768): what sets these layers apart from a truncated SVD, which stays available as a rule."""

LARGE, TINY, LARGE_RANKS = 192, 32, 4
"""One large matrix has a side >= 192 (a quarter of the layer's narrow side when that is less), its
partner sides <= 32, and at most 4 terms are summed: a large product per term is what each costs."""

RUN_WEIGHTS = (0.3, 0.1, 0.0)
"""Loss of a layer that costs as many FLOPs as the dense one: 0.3 trades five times fewer FLOPs for
the loss of up to three times fewer numbers. A budget that it would leave unused (small factors) is
spent on quality with the next weight."""

TOLERANCE = 1.03
"""A plan lands in [factor, 1.03 factor] wherever shapes allow it."""

BUCKETS = 1500
"""Resolution of the budget while mixes are joined: 0.07 % of it."""


@dataclass(frozen=True)
class Candidate:
    """One way to hold a layer: its groups (none: dense), numbers stored, predicted loss."""

    weights: int
    loss: float
    groups: Groups = ()


def predicted_loss(shape: KroneckerShape, dense_weights: int, *, table: bool) -> float:
    """-log of the predicted part of a layer's squared output that is kept; ``table``: embedding."""
    if shape.rank >= shape.full_rank or shape.parameters >= dense_weights:
        return 0.0
    if not table:
        ratio = math.log(dense_weights / shape.parameters)
        # Nothing but the truncated SVD was measured beyond a full rank of 256.
        spread = 1.19 - 0.064 * min(math.log2(shape.full_rank), 8)
        if shape.low_rank:
            spread = 0.5
        return 0.192 * spread * ratio * (1 + 0.146 * ratio)
    # Part of the singular values dropped: for one row per entry the same as numbers saved, and it
    # stays honest for a table with fewer rows than columns.
    ratio = shape.full_rank / shape.rank
    svd = 0.27 + 0.065 * math.log2(ratio)
    # n = b_in lies between the ratio (one term) and the width (truncated SVD).
    spread = math.log(shape.in_features / ratio) if ratio < shape.in_features else 0.0
    place = math.log(max(shape.b_in / ratio, 1.0)) / spread if spread > 0 else 1.0
    return (1 + min(place, 1.0) * (svd - 1)) * math.log(ratio)


def fast(shape: KroneckerShape) -> bool:
    """One large ``b`` on contiguous rows beside a tiny ``a``, or all sides multiples of 16."""
    b_sides = (shape.b_out, shape.b_in)
    a_sides = (shape.a_out, shape.a_in)
    large = min(LARGE, min(shape.out_features, shape.in_features) // 4)
    if max(b_sides) >= large and min(a_sides) >= 2 and max(a_sides) <= TINY:
        return min(b_sides) >= TINY and shape.rank <= LARGE_RANKS
    return all(side % 16 == 0 for side in (*a_sides, *b_sides))


@cache
def shapes_of(out: int, inner: int) -> tuple[KroneckerShape, ...]:
    """Every divisor pair and number of terms with fewer numbers and FLOPs than the dense layer, and
    `KEPT_RANK`. Of those the shapes that run fast; where the sizes have none (odd widths), all."""
    dense, flops = out * inner, dense_flops(out, inner)
    shapes = []
    for a_out in divisors(out):
        for a_in in divisors(inner):
            b_out, b_in = out // a_out, inner // a_in
            for rank in RANKS:
                shape = KroneckerShape(a_out, a_in, b_out, b_in, rank)
                if shape.parameters >= dense or rank > shape.full_rank or shape.flops() > flops:
                    break
                if rank * min(a_out, a_in) * min(b_out, b_in) >= KEPT_RANK * min(out, inner):
                    shapes.append(shape)
    return tuple(shape for shape in shapes if fast(shape)) or tuple(shapes)


def linear_candidates(out: int, inner: int, run_weight: float) -> list[Candidate]:
    """Ways to hold an (out, inner) linear layer: dense, a truncated SVD, or one of `shapes_of`."""
    dense, flops = out * inner, dense_flops(out, inner)
    found = [Candidate(dense, run_weight)]
    ranks = range(1, (dense - 1) // (out + inner) + 1)
    for shape in (*(low_rank(out, inner, rank) for rank in ranks), *shapes_of(out, inner)):
        loss = predicted_loss(shape, dense, table=False) + run_weight * shape.flops() / flops
        found.append(Candidate(shape.parameters, loss, (shape,)))
    return pareto(found)


def table_candidates(rows: int, width: int) -> list[Candidate]:
    """Ways to hold a (rows, width) embedding: dense, a (rows x width/n) ⊗ b (1 x n) of one term, a
    truncated SVD of any rank (n = width), or one whose blocks of rows have ranks of their own."""
    dense = rows * width
    found = [Candidate(dense, 0.0)]
    for groups, kept in row_ranks(rows, width):
        weights = sum(shape.parameters for shape in groups)
        if weights < dense and len(groups) > 1:
            found.append(Candidate(weights, -math.log(kept), groups))
    for n in divisors(width):
        top = 1 if n < width else min(rows, width)
        for rank in range(1, top + 1):
            shape = KroneckerShape(rows, width // n, 1, n, rank)
            if shape.parameters >= dense:
                break
            found.append(
                Candidate(shape.parameters, predicted_loss(shape, dense, table=True), (shape,))
            )
    return pareto(found)


def position_candidates(rows: int, width: int) -> list[Candidate]:
    """Ways to hold a (rows, width) table of positions: dense or a truncated SVD.

    Positions lie on a smooth curve: rank 4 / 8 / 16 / 32 / 64 of MiniLM's 512 x 384 keeps 0.43 /
    0.72 / 0.98 / 0.99 / 0.99; the law says 0.49 / 0.69 / 0.98 / 0.98 / 0.99. Less than full rank
    always loses a little, so that larger ones and the dense table are found for factors near 1."""
    found = [Candidate(rows * width, 0.0)]
    for rank in range(1, (rows * width - 1) // (rows + width) + 1):
        kept = 0.975 * min(1.0, 24 * rank / width) ** 0.5 + 0.025 * min(1.0, 3 * rank / width)
        kept *= 1 - 1e-4 * (1 - rank / width)
        shape = low_rank(rows, width, rank)
        found.append(Candidate(shape.parameters, -math.log(kept), (shape,)))
    return pareto(found)


def candidates(layer: LayerSize, run_weight: float = RUN_WEIGHTS[0]) -> list[Candidate]:
    """Ways to hold ``layer``, weights ascending, loss descending; the last is dense, unless what it
    costs to run outweighs what it keeps."""
    if layer.kind == "embedding":
        return table_candidates(layer.out, layer.inner)
    if layer.kind == "position":
        return position_candidates(layer.out, layer.inner)
    return linear_candidates(layer.out, layer.inner, run_weight)


def pareto(found: Iterable[Candidate]) -> list[Candidate]:
    """Without those another candidate beats in both weights and loss; weights ascending."""
    kept: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.weights, c.loss, c.groups)):
        if not kept or candidate.loss < kept[-1].loss - 1e-12:
            kept.append(candidate)
    return kept


def best_under(layer: LayerSize, factor: float) -> Groups:
    """The groups with the least predicted loss among those at least ``factor`` times smaller; what
    they would leave unused is spent on quality, as by `choose`."""
    picked: list[Candidate] = []
    for run_weight in RUN_WEIGHTS:
        found = candidates(layer, run_weight)
        allowed = [c for c in found if c.weights * factor <= layer.weights and c.groups]
        if not allowed:
            break
        picked.append(min(allowed, key=lambda c: c.loss))
        if layer.weights <= picked[-1].weights * factor * TOLERANCE:
            break
    if not picked:
        largest = layer.weights / min(c.weights for c in candidates(layer))
        raise PlanError(
            f"{layer.name!r}: factor={factor:g} is out of reach for {layer.out}x{layer.inner}; the "
            f"largest is {_down(largest)}. Ask for less, or give a shape or {{'rank': 1}}."
        )
    return picked[-1].groups


def choose(
    free: Sequence[LayerSize], settled: int, total: int, factor: float
) -> Mapping[str, Groups]:
    """Groups of every free layer: the least summed loss with settled + weights <= total / factor.

    settled: parameters of everything else; total: of the model before. Layers of one size and group
    share their groups, as in the papers. A layer's loss counts once; the word embedding's counts
    twice per transformer layer (six matrices), since every one of them reads it; a position table's
    an eighth of that, a pooler's half a layer. Raises `PlanError` when even the smallest shapes are
    too large, with the factor they reach.
    """
    if not total:
        raise PlanError(f"factor={factor:g}: the model has no parameter. Give one with layers.")
    budget = math.floor(total / factor) - settled
    classes: dict[tuple[str, str, int, int], list[LayerSize]] = {}
    for layer in free:
        key = (layer.group, layer.kind, layer.out, layer.inner)
        classes.setdefault(key, []).append(layer)
    depth = max(1.0, sum(layer.group in ("attention", "feed-forward") for layer in free) / 6)
    picks: list[Groups] = []
    for run_weight in RUN_WEIGHTS:
        options = []
        for (group, kind, _, _), members in classes.items():
            weight = len(members) * {"position": depth / 4, "embedding": 2 * depth}.get(kind, 1.0)
            weight *= 0.5 if group == "other" else 1.0
            options.append(
                [
                    Candidate(len(members) * c.weights, weight * c.loss, c.groups)
                    for c in candidates(members[0], run_weight)
                ]
            )
        least = sum(choice[0].weights for choice in options)
        if least > budget:
            reach = total / (settled + least)
            advice = f"Ask for at most {_down(reach)} times fewer than these, or keep less dense."
            if reach < 1.01:
                advice = "Keep less dense."
            raise PlanError(
                f"factor={factor:g} is out of reach: the smallest shapes leave {settled + least:,} "
                f"of {total:,} parameters, {settled:,} of them in layers kept dense or ruled, in "
                f"biases and norms. {advice}"
            )
        used, picks = _join(options, budget)
        if total / (settled + used) <= factor * TOLERANCE:
            break
    return {
        layer.name: groups
        for members, groups in zip(classes.values(), picks, strict=True)
        for layer in members
    }


def _join(options: list[list[Candidate]], budget: int) -> tuple[int, list[Groups]]:
    """Weights used and the choice in each class with the least summed loss in the budget.

    A multiple-choice knapsack: classes are joined one by one, keeping the best mix in each of
    `BUCKETS` slices of the budget. Each choice is sorted by weights, and its first ones fit."""
    rest = [sum(choice[0].weights for choice in options[i + 1 :]) for i in range(len(options))]
    mixes: list[tuple[int, float, tuple[Groups, ...]]] = [(0, 0.0, ())]
    for choice, still_needed in zip(options, rest, strict=True):
        best: dict[int, tuple[int, float, tuple[Groups, ...]]] = {}
        for weights, loss, groups in mixes:
            for candidate in choice:
                used = weights + candidate.weights
                if used + still_needed > budget:
                    break
                mix = (used, loss + candidate.loss, (*groups, candidate.groups))
                bucket = used * BUCKETS // max(budget, 1)
                if bucket not in best or mix[1] < best[bucket][1]:
                    best[bucket] = mix
        mixes = []
        for mix in sorted(best.values(), key=lambda m: (m[0], m[1])):
            if not mixes or mix[1] < mixes[-1][1]:
                mixes.append(mix)
    used, _, picks = min(mixes, key=lambda mix: mix[1])
    return used, list(picks)


def _down(factor: float) -> str:
    """``factor`` with two decimals, rounded down: what can be asked for."""
    return f"{math.floor(factor * 100) / 100:g}"


def svd_rank(out: int, inner: int, weights: int) -> KroneckerShape:
    """The truncated SVD of an (out, inner) weight with at most ``weights`` numbers, but rank 1 at
    least: the rival of the same size that results are compared with."""
    return low_rank(out, inner, max(1, weights // (out + inner)))
