"""Fits to outputs: stationary points, optima, monotone alternation, balanced terms."""

from itertools import pairwise

import pytest
import torch

from kronbert.decompose import nearest_kronecker, rearranged
from kronbert.reference import kron_weight
from kronbert.shapes import KroneckerShape, low_rank, parse_groups
from kronbert.weighted_fit import (
    AlternatingStep,
    Objective,
    balanced,
    low_rank_step,
    nearest_blocks,
    nearest_outputs,
    nearest_rows,
    sum_of,
)

SHAPES = ["5x4*2x7", "2x3*8x6", "3:5x4*2x7", "2:2x3*8x6", "7:2x3*5x4"]


def problem(out, inner, rows=400):
    """Correlated inputs, targets that no weight meets exactly, and the weight behind them."""
    x = torch.randn(rows, inner, dtype=torch.float64) @ torch.randn(inner, inner).double()
    weight = torch.randn(out, inner, dtype=torch.float64)
    y = (x + torch.randn_like(x)) @ weight.T
    return x, y, weight, Objective(x.T @ x / rows, y.T @ x / rows)


def loss(x, y, weight):
    return (y - x @ weight.T).square().sum().item() / len(x)


def pair_of(shape):
    a = torch.randn(shape.rank, shape.a_out, shape.a_in, dtype=torch.float64)
    b = torch.randn(shape.rank, shape.b_out, shape.b_in, dtype=torch.float64)
    return a, b


def slope(objective, a, b, by):
    """The gradient of the objective by a or b, over what it is at zero."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()

    def value(a, b):
        weight = kron_weight(a, b)
        return ((weight @ objective.gram - 2 * objective.cross) * weight).sum()

    one, other = torch.autograd.grad(value(a, b), (a, b))
    zero_a, zero_b = a.detach() * 0, b.detach() * 0
    if by == "a":
        at_zero = torch.autograd.grad(value(zero_a.requires_grad_(), b), zero_a)[0]
        return one.abs().max() / at_zero.abs().max()
    at_zero = torch.autograd.grad(value(a, zero_b.requires_grad_()), zero_b)[0]
    return other.abs().max() / at_zero.abs().max()


def test_the_value_is_the_loss_up_to_a_constant():
    x, y, weight, objective = problem(10, 28)
    constant = y.square().sum().item() / len(y)
    other = torch.randn_like(weight)
    for one in (weight, other):
        assert objective.value(one) + constant == pytest.approx(loss(x, y, one))
    rest = objective.without(other)
    assert rest.value(weight - other) - rest.value(weight) == pytest.approx(
        objective.value(weight) - objective.value(weight + other)
    )


def test_the_ridge_pulls_to_the_weight():
    x, y, weight, objective = problem(10, 28)
    share = 0.3
    ridged = objective.ridged(weight, share)
    scale = objective.gram.diagonal().mean() * share
    values = []
    for one in (weight, torch.randn_like(weight)):
        pulled = loss(x, y, one) + scale * (one - weight).square().sum().item()
        values.append((ridged.value(one), pulled))
    (v, p), (w, q) = values
    assert v - w == pytest.approx((p - q).item())


@pytest.mark.parametrize("spec", SHAPES)
def test_each_step_is_stationary_and_says_its_value(spec):
    shape = KroneckerShape.parse(spec)
    *_, objective = problem(shape.out_features, shape.in_features)
    step, cross = AlternatingStep(objective.gram, shape), rearranged(objective.cross, shape)
    a, b = pair_of(shape)
    new_a, value = step.a(cross, a, b)
    assert slope(objective, new_a, b, "a") < 1e-7
    assert value == pytest.approx(objective.value(kron_weight(new_a, b)))
    assert value < objective.value(kron_weight(a, b))
    new_b, value = step.b(cross, a, b)
    assert slope(objective, a, new_b, "b") < 1e-7
    assert value == pytest.approx(objective.value(kron_weight(a, new_b)))


def test_a_step_is_the_brute_force_solution():
    """Least squares over the columns that each entry of a makes in the outputs."""
    shape = KroneckerShape.parse("2:3x4*5x2")
    x, y, _, objective = problem(15, 8)
    a, b = pair_of(shape)
    columns = []
    for i in range(a.numel()):
        one = torch.zeros_like(a)
        one.view(-1)[i] = 1
        columns.append((x @ kron_weight(one, b).T).flatten())
    wanted = torch.linalg.lstsq(torch.stack(columns, 1), y.flatten()[:, None]).solution
    step = AlternatingStep(objective.gram, shape)
    found, _ = step.a(rearranged(objective.cross, shape), a, b)
    torch.testing.assert_close(found.flatten(), wanted.flatten(), rtol=1e-6, atol=1e-8)


def test_terms_along_one_another_do_not_stop_a_step():
    shape = KroneckerShape.parse("3:5x4*2x7")
    *_, objective = problem(10, 28)
    a, b = pair_of(shape)
    b[1], b[2] = 2 * b[0], 0
    step, cross = AlternatingStep(objective.gram, shape), rearranged(objective.cross, shape)
    new, value = step.a(cross, a, b)
    assert torch.isfinite(new).all()
    assert value == pytest.approx(objective.value(kron_weight(new, b)))
    assert value < objective.value(kron_weight(a, b))
    same, value = step.a(cross, a, b * 0)
    assert torch.equal(same, a)
    assert value == 0


@pytest.mark.parametrize(("out", "inner"), [(17, 28), (28, 17)])
@pytest.mark.parametrize("rank", [1, 3, 30])
def test_low_rank_is_the_optimum(out, inner, rank):
    """Against the truncated SVD of T M^½ from numpy-like dense roots."""
    *_, weight, objective = problem(out, inner)
    objective = objective.ridged(weight, 0.01)
    values, vectors = torch.linalg.eigh(objective.gram)
    root = vectors @ (values.sqrt()[:, None] * vectors.T)
    free = torch.linalg.solve(objective.gram, objective.cross.T).T
    sigma = torch.linalg.svdvals(free @ root)
    wanted = objective.value(free) + sigma[rank:].square().sum().item()
    shape = low_rank(out, inner, rank)
    (pair,) = nearest_outputs(objective, [shape], [pair_of(shape)])
    assert [tuple(t.shape) for t in pair] == [(rank, out, 1), (rank, 1, inner)]
    assert objective.value(kron_weight(*pair)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("spec", SHAPES[:4])
def test_a_fit_beats_every_weight_only_start(spec):
    shape = KroneckerShape.parse(spec)
    *_, weight, objective = problem(shape.out_features, shape.in_features)
    objective = objective.ridged(weight, 0.01)
    free = torch.linalg.solve(objective.gram, objective.cross.T).T
    starts = []
    for target in (weight, free):
        a, b, _ = nearest_kronecker(target, shape)
        starts.append(list(zip(a, b, strict=True)))
    fitted = objective.value(sum_of(nearest_outputs(objective, [shape], starts[0])))
    lowest = min(objective.value(sum_of(start)) for start in starts)
    assert objective.value(free) < fitted < lowest


def test_inputs_of_zero_leave_what_is_nearest_to_the_weight():
    shape = KroneckerShape.parse("3:5x4*2x7")
    weight = torch.randn(10, 28, dtype=torch.float64)
    nothing = Objective(torch.zeros(28, 28).double(), torch.zeros(10, 28).double())
    fitted = sum_of(nearest_outputs(nothing.ridged(weight, 0.01), [shape], [pair_of(shape)]))
    error = nearest_kronecker(weight, shape)[2]
    assert (weight - fitted).norm() / weight.norm() == pytest.approx(error)


@pytest.mark.parametrize("spec", ["3:5x4*2x7", "3:10x1*1x28", "2:5x4*2x7 + 2:10x1*1x28"])
def test_fitted_terms_are_balanced(spec):
    groups = parse_groups(spec)
    *_, objective = problem(10, 28)
    for a, b in nearest_outputs(objective, groups, [pair_of(shape) for shape in groups]):
        a, b = a.flatten(1), b.flatten(1)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1))
        products = a @ a.T
        torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-9, rtol=0)


def test_full_rank_meets_the_free_minimum():
    shape = KroneckerShape.parse("7:2x3*5x4")
    *_, objective = problem(10, 12)
    free = torch.linalg.solve(objective.gram, objective.cross.T).T
    ((a, b),) = nearest_outputs(objective, [shape], [pair_of(shape)])
    torch.testing.assert_close(kron_weight(a, b), free)
    assert a[6].abs().max() < 1e-6
    assert b[6].abs().max() < 1e-6


def test_a_good_start_is_kept_and_never_left_for_worse():
    shape = KroneckerShape.parse("2:5x4*2x7")
    *_, objective = problem(10, 28)
    best = nearest_outputs(objective, [shape], [pair_of(shape)], sweeps=400, enough=0)
    value = objective.value(sum_of(best))
    again = nearest_outputs(objective, [shape], best, sweeps=1)
    assert objective.value(sum_of(again)) <= value + 1e-9 * abs(value)
    none = nearest_outputs(objective, [shape], best, sweeps=0)
    assert objective.value(sum_of(none)) == pytest.approx(value)


def test_inputs_of_kronecker_covariance_are_solved_by_the_start():
    """There the nearest sum in the inputs' norm is exact: no sweep is needed."""
    shape = KroneckerShape.parse("2:5x4*3x7")
    p, q = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 7, dtype=torch.float64)
    gram = torch.kron(p.T @ p, q.T @ q)
    objective = Objective(gram, torch.randn(15, 28, dtype=torch.float64) @ gram)
    start = nearest_outputs(objective, [shape], [pair_of(shape)], sweeps=0)
    swept = nearest_outputs(objective, [shape], [pair_of(shape)], sweeps=50, enough=0)
    wanted = objective.value(sum_of(swept))
    assert objective.value(sum_of(start)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    "groups",
    [
        ("2:5x4*8x6", "3:40x1*1x24"),
        ("3:40x1*1x24", "2:5x4*8x6"),
        ("1:5x4*8x6", "1:8x6*5x4", "1:2x12*20x2"),
    ],
)
def test_several_groups_never_increase(groups):
    shapes = [KroneckerShape.parse(spec) for spec in groups]
    *_, weight, objective = problem(40, 24)
    a, b, _ = nearest_kronecker(weight, shapes)
    start = list(zip(a, b, strict=True))
    values = [
        objective.value(sum_of(nearest_outputs(objective, shapes, start, sweeps=n, enough=0)))
        for n in range(8)
    ]
    assert values[0] <= objective.value(sum_of(start)) + 1e-9
    assert all(later < one for one, later in pairwise(values))
    alone = min(
        objective.value(sum_of(nearest_outputs(objective, [shape], [pair_of(shape)])))
        for shape in shapes
    )
    assert values[-1] < alone


def test_a_low_rank_step_meets_what_the_others_leave():
    *_, objective = problem(17, 28)
    other = torch.randn(17, 28, dtype=torch.float64)
    root = torch.linalg.cholesky(objective.gram)
    whole = kron_weight(*low_rank_step(objective.without(other), root, 17))
    free = torch.linalg.solve(objective.gram, objective.cross.T).T
    torch.testing.assert_close(whole, free - other)


@pytest.mark.parametrize("spec", ["3:5x4*2x7", "9:5x4*2x3", "12:5x2*3x3"])
def test_balanced_changes_no_sum(spec):
    shape = KroneckerShape.parse(spec)
    a, b = pair_of(shape)
    new_a, new_b = balanced(a * 1000, b / 7)
    torch.testing.assert_close(kron_weight(new_a, new_b), kron_weight(a, b) * 1000 / 7)
    assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
    norms = new_a.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, new_b.flatten(1).norm(dim=1))
    assert (norms[:-1] >= norms[1:]).all()
    products = new_a.flatten(1) @ new_a.flatten(1).T
    torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("spec", ["3:50x1*1x12", "2:50x4*1x3", "5:50x4*1x3"])
def test_rows_are_the_weighted_optimum(spec):
    shape = KroneckerShape.parse(spec)
    table = torch.randn(50, 12) @ torch.randn(12, 12)
    weights = torch.rand(50, dtype=torch.float64) ** 4 + 1e-3
    (pair,) = nearest_rows(table, weights, [shape])
    assert [tuple(t.shape) for t in pair] == [
        (shape.rank, 50, shape.a_in),
        (shape.rank, 1, shape.b_in),
    ]
    missed = weights.sqrt()[:, None] * (table.double() - kron_weight(*pair))
    blocks = (weights.sqrt()[:, None] * table.double()).reshape(-1, shape.b_in)
    wanted = torch.linalg.svdvals(blocks)[shape.rank :].square().sum().item()
    assert missed.square().sum().item() == pytest.approx(wanted, abs=1e-9)


def test_several_groups_of_rows_beat_each_alone():
    shapes = [KroneckerShape.parse(spec) for spec in ("2:50x1*1x12", "1:50x4*1x3")]
    table = torch.randn(50, 12, dtype=torch.float64)
    weights = torch.rand(50, dtype=torch.float64) + 0.01

    def missed(groups, sweeps=12):
        pairs = nearest_rows(table, weights, groups, sweeps=sweeps)
        return (weights[:, None] * (table - sum_of(pairs)).square()).sum().item()

    values = [missed(shapes, sweeps) for sweeps in range(1, 6)]
    assert all(later < one for one, later in pairwise(values))
    assert values[0] < min(missed([shape]) for shape in shapes)


BLOCKS = {
    "two": "2:40x1*1x12 + 3:7x1*1x12@3 + 2:9x1*1x12@10",
    "two that overlap, and a whole group": "1:40x4*1x3 + 3:8x1*1x12 + 2:40x1*1x12 + 2:9x2*1x6@5",
    "all rows in blocks": "2:40x1*1x12 + 1:15x1*1x12 + 4:25x1*1x12@15",
    "more terms than rows": "2:40x1*1x12 + 6:3x1*1x12@2",
    "few frequent rows, many terms for all": "8:40x1*1x12 + 1:20x1*1x12",
}


def by_frequency(rows=40, width=12, fall=0.7):
    """A table with falling singular values, and Zipf's counts of its rows."""
    table = torch.randn(rows, width) @ (
        torch.diag(fall ** torch.arange(width)) @ torch.randn(width, width)
    )
    return table.double(), 1 / torch.arange(2.0, rows + 2, dtype=torch.float64)


def missed_by(table, weights, groups, **more):
    return missed_of(table, weights, groups, nearest_rows(table, weights, groups, **more))


def missed_of(table, weights, groups, pairs):
    made = kron_weight([a for a, _ in pairs], [b for _, b in pairs], [s.start for s in groups])
    return (weights[:, None] * (table - made).square()).sum().item()


@pytest.mark.parametrize("spec", BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_rows_never_rise(spec):
    groups = parse_groups(spec)
    for _ in range(5):
        table, weights = by_frequency()
        values = [missed_by(table, weights, groups, sweeps=sweeps) for sweeps in (1, 2, 3, 5, 12)]
        assert all(later <= one * (1 + 1e-9) for one, later in pairwise(values))
        assert values[0] <= missed_by(table, weights, groups[:1]) * (1 + 1e-9)


@pytest.mark.parametrize("spec", BLOCKS.values(), ids=BLOCKS)
def test_the_last_block_is_the_optimum_beside_the_others(spec):
    groups = parse_groups(spec)
    table, weights = by_frequency()
    *others, _ = pairs = nearest_rows(table, weights, groups)
    last, rest = groups[-1], table.clone()
    for pair, shape in zip(others, groups, strict=False):
        rest[shape.start : shape.start + shape.out_features] -= kron_weight(*pair)
    left = weights.sqrt()[:, None] * rest
    inside = slice(last.start, last.start + last.out_features)
    tail = torch.linalg.svdvals(left[inside].reshape(-1, last.b_in))[last.rank :]
    left[inside] = 0
    wanted = tail.square().sum().item() + left.square().sum().item()
    assert missed_of(table, weights, groups, pairs) == pytest.approx(wanted)


def test_disjoint_blocks_of_full_rank_are_exact():
    groups = parse_groups("12:40x1*1x12 + 7:7x1*1x12@3 + 9:9x1*1x12@31")
    table, weights = by_frequency()
    assert missed_by(table, weights, groups, sweeps=1) < 1e-20
    # Between them, with a first group that is exact on the rest alone.
    table[10:31] = torch.randn(21, 2).double() @ torch.randn(2, 12).double()
    table[:3], table[39:] = table[12:15], 0
    groups = parse_groups("2:40x1*1x12 + 7:7x1*1x12@3 + 9:9x1*1x12@31")
    assert missed_by(table, weights, groups) < 1e-20
    assert missed_by(table, weights, groups[:1]) > 0.1


def test_nearest_blocks_says_its_error_and_writes_to_nothing():
    groups = parse_groups(BLOCKS["two that overlap, and a whole group"])
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        table = by_frequency()[0].to(dtype)
        given = table.clone()
        pairs, error = nearest_blocks(table, groups)
        assert torch.equal(table, given)
        assert {t.dtype for pair in pairs for t in pair} == {dtype}
        missed = missed_of(
            table.double(),
            table.new_ones(40).double(),
            groups,
            [(a.double(), b.double()) for a, b in pairs],
        )
        assert error == pytest.approx(missed**0.5 / table.norm().item(), rel=near)
    assert nearest_blocks(torch.zeros(40, 12), groups)[1] == 0


def test_blocks_beat_one_rank_for_all_at_equal_size():
    """What they are for: counts that fall as Zipf's law says, over 2,000 words of 48 numbers."""
    groups = parse_groups("4:2000x1*1x48 + 24:60x1*1x48 + 12:300x1*1x48@60")
    table, weights = by_frequency(2000, 48, 0.98)
    numbers = sum(shape.parameters for shape in groups)
    single = low_rank(2000, 48, -(-numbers // (2000 + 48)))
    assert single.parameters >= numbers
    ours, theirs = missed_by(table, weights, groups), missed_by(table, weights, [single])
    assert ours < 0.8 * theirs
