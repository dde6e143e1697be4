"""`nearest_kronecker`: a full SVD's optimum, exact at full rank, honest errors, little memory."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import ArpackNoConvergence

from kronbert import decompose
from kronbert.decompose import nearest_kronecker, rearranged
from kronbert.errors import ShapeError
from kronbert.reference import kron_weight
from kronbert.shapes import KroneckerShape, low_rank

# Every side different; R tall, wide, low rank, an embedding, and a square one.
SHAPES = ["5x4*2x7", "2x3*8x6", "2x2*3x11", "42x1*1x15", "30x4*1x6", "6x6*4x4"]


def matrix(shape, dtype=torch.float64):
    return torch.randn(shape.out_features, shape.in_features, dtype=torch.float64).to(dtype)


def true_error(weight, a, b):
    weight = weight.double()
    rest = weight - kron_weight([t.double() for t in a], [t.double() for t in b])
    return (rest.norm() / weight.norm()).item()


def best_error(weight, shape):
    """From all singular values of the rearranged matrix, cut block by block in numpy."""
    w = weight.double().numpy()
    rows = [
        w[i * shape.b_out :, j * shape.b_in :][: shape.b_out, : shape.b_in].ravel()
        for i in range(shape.a_out)
        for j in range(shape.a_in)
    ]
    values = np.linalg.svd(np.stack(rows), compute_uv=False)
    return float(np.sqrt((values[shape.rank :] ** 2).sum() / (values**2).sum()))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("spec", SHAPES)
def test_it_is_the_optimum(spec, rank):
    shape = KroneckerShape.parse(f"{rank}:{spec}")
    weight = matrix(shape)
    a, b, error = nearest_kronecker(weight, shape)
    assert [tuple(t.shape) for t in (*a, *b)] == [
        (rank, shape.a_out, shape.a_in),
        (rank, shape.b_out, shape.b_in),
    ]
    assert error == pytest.approx(best_error(weight, shape), abs=1e-12)
    assert error == pytest.approx(true_error(weight, a, b), abs=1e-12)


def test_rearranged_has_a_block_in_each_row():
    shape = KroneckerShape(3, 2, 4, 5)
    weight = matrix(shape)
    rows = rearranged(weight, shape)
    assert rows.shape == (6, 20)
    torch.testing.assert_close(rows[1 * 2 + 1], weight[4:8, 5:10].flatten())


@pytest.mark.parametrize(
    "spec",
    [
        "4:384x384*2x2",  # K8 attention
        "16:8x2*384x384",  # K8 feed-forward
        "16:2x8*384x384",
        "32:384x48*2x16",  # K21
        "32:16x2*192x384",
        "32:2x16*384x192",
    ],
)
def test_exact_at_full_rank(spec):
    shape = KroneckerShape.parse(spec)
    assert shape.rank == shape.full_rank
    a, b, error = nearest_kronecker(matrix(shape), shape)
    assert error < 1e-12
    weight = matrix(shape, torch.float32)
    a, b, error = nearest_kronecker(weight, shape)
    assert error < 1e-6
    assert true_error(weight, a, b) < 1e-6


def test_the_error_falls_with_every_term():
    weight = matrix(KroneckerShape(6, 5, 4, 7))
    errors = [nearest_kronecker(weight, KroneckerShape(6, 5, 4, 7, r))[2] for r in range(1, 29)]
    assert all(later < one for one, later in pairwise(errors))
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    shape = KroneckerShape(6, 5, 4, 7, 2)
    weight = matrix(shape, dtype)
    a, b, error = nearest_kronecker(weight, shape)
    assert {t.dtype for t in (*a, *b)} == {dtype}
    assert error == pytest.approx(best_error(weight, shape), abs=1e-9)
    # The terms are rounded once, at the end.
    rounding = torch.finfo(dtype).eps
    assert abs(true_error(weight, a, b) - error) < rounding + 1e-12


def test_terms_are_balanced_and_orthogonal():
    shape = KroneckerShape(6, 5, 4, 7, 4)
    (a,), (b,), _ = nearest_kronecker(matrix(shape), shape)
    norms = a.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, b.flatten(1).norm(dim=1))
    assert (norms[:-1] >= norms[1:]).all()
    products = a.flatten(1) @ a.flatten(1).T
    torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-10, rtol=0)


def test_a_sum_of_kronecker_products_is_found_again():
    shape = KroneckerShape(9, 5, 4, 7, 2)
    a, b = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    _, _, error = nearest_kronecker(kron_weight(a, b), shape)
    assert error < 1e-12
    # Terms that are not needed are nothing, not noise divided by nothing.
    a, b, error = nearest_kronecker(kron_weight(a, b), KroneckerShape(9, 5, 4, 7, 6))
    assert error < 1e-12
    assert torch.isfinite(a[0]).all()
    assert a[0][2:].abs().max() < 1e-6
    assert b[0][2:].abs().max() < 1e-6


def test_more_terms_than_exist_are_zero():
    shape = KroneckerShape(2, 2, 3, 5, 6)
    weight = matrix(shape)
    (a,), (b,), error = nearest_kronecker(weight, shape)
    assert error < 1e-12
    assert (a.shape, b.shape) == ((6, 2, 2), (6, 3, 5))
    assert not a[4:].any()
    assert not b[4:].any()


@pytest.mark.parametrize(
    "groups",
    [
        ("2:5x4*8x6", "3:40x1*1x24"),
        ("3:40x1*1x24", "2:5x4*8x6"),
        ("1:5x4*8x6", "1:8x6*5x4", "1:2x12*20x2"),
    ],
)
@pytest.mark.parametrize("kind", ["random", "kronecker", "low rank"])
def test_mixed_groups_are_never_worse_than_one_of_them(groups, kind):
    shapes = [KroneckerShape.parse(spec) for spec in groups]
    weight = matrix(shapes[0]) * (0.05 if kind != "random" else 1.0)
    if kind != "random":
        near = KroneckerShape(5, 4, 8, 6, 2) if kind == "kronecker" else low_rank(40, 24, 3)
        a, b, _ = nearest_kronecker(matrix(near), near)
        weight += kron_weight(a, b)
    a, b, error = nearest_kronecker(weight, shapes)
    assert [t.shape[0] for t in a] == [shape.rank for shape in shapes]
    assert error == pytest.approx(true_error(weight, a, b), abs=1e-12)
    alone = min(nearest_kronecker(weight, shape)[2] for shape in shapes)
    assert error < alone


def test_the_best_group_alone_is_where_mixed_groups_start(monkeypatch):
    """From the first group instead, one sweep ends above what the second reaches alone."""
    monkeypatch.setattr(decompose, "SWEEPS", 1)
    shapes = [KroneckerShape(5, 4, 8, 6), low_rank(40, 24, 4)]
    worst = 0.0
    for seed in range(30):
        torch.manual_seed(seed)
        tail = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.02], dtype=torch.float64)
        weight = torch.randn(40, 5, dtype=torch.float64) * tail
        weight = weight @ torch.randn(5, 24, dtype=torch.float64)
        alone = min(nearest_kronecker(weight, shape)[2] for shape in shapes)
        worst = max(worst, nearest_kronecker(weight, shapes)[2] - alone)
    assert worst <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_groups_are_fitted_in_float64(dtype):
    shapes = [KroneckerShape(5, 4, 8, 6, 2), low_rank(40, 24, 3)]
    weight = matrix(shapes[0], dtype)
    a, _, error = nearest_kronecker(weight, shapes)
    assert {t.dtype for t in a} == {dtype}
    assert error == pytest.approx(nearest_kronecker(weight.double(), shapes)[2], abs=1e-12)


def test_a_sum_of_both_kinds_is_fitted_closely():
    shapes = [KroneckerShape(5, 4, 8, 6), low_rank(40, 24, 1)]
    parts = [nearest_kronecker(matrix(shape), shape)[:2] for shape in shapes]
    weight = sum(kron_weight(a, b) for a, b in parts)
    assert nearest_kronecker(weight, shapes)[2] < 0.02


@pytest.mark.parametrize("spec", ["2:6x5*4x7", "2:100x4*1x300", "3:20x15*15x20"])
def test_an_all_zero_weight(spec, monkeypatch):
    monkeypatch.setattr(decompose, "SMALL_SIDE", 100)
    shape = KroneckerShape.parse(spec)
    weight = torch.zeros(shape.out_features, shape.in_features)
    for groups in (shape, [shape, low_rank(shape.out_features, shape.in_features, 2)]):
        a, b, error = nearest_kronecker(weight, groups)
        assert error == 0.0
        assert not any(kron_weight(*pair).any() for pair in zip(a, b, strict=True))
        assert all(torch.isfinite(t).all() for t in (*a, *b))


@pytest.mark.parametrize("spec", ["3:30x12*20x17", "2:400x1*1x320", "12:20x16*24x15"])
def test_leading_pairs_agree_with_all_of_them(spec, monkeypatch):
    """Above SMALL_SIDE only the leading eigenvectors are computed, by Lanczos iteration."""
    shape = KroneckerShape.parse(spec)
    weight = matrix(shape)
    monkeypatch.setattr(decompose, "SMALL_SIDE", 300)
    assert shape.full_rank > decompose.SMALL_SIDE
    assert shape.rank <= shape.full_rank // 8
    a, b, error = nearest_kronecker(weight, shape)
    again_a, again_b, _ = nearest_kronecker(weight, shape)
    assert torch.equal(a[0], again_a[0])
    assert torch.equal(b[0], again_b[0])
    monkeypatch.setattr(decompose, "SMALL_SIDE", 10**6)
    full_a, full_b, full_error = nearest_kronecker(weight, shape)
    assert error == pytest.approx(full_error, abs=1e-12)
    torch.testing.assert_close(kron_weight(a, b), kron_weight(full_a, full_b), atol=1e-7, rtol=0)
    for ours, theirs in ((a[0], full_a[0]), (b[0], full_b[0])):
        torch.testing.assert_close(ours.flatten(1).norm(dim=1), theirs.flatten(1).norm(dim=1))


def test_when_the_iteration_does_not_converge(monkeypatch):
    def stuck(*args, **kwargs):
        raise ArpackNoConvergence("no convergence", np.empty(0), np.empty((0, 0)))

    monkeypatch.setattr(decompose, "SMALL_SIDE", 10)
    monkeypatch.setattr("scipy.sparse.linalg.eigsh", stuck)
    weight = matrix(low_rank(40, 30, 2))
    error = nearest_kronecker(weight, low_rank(40, 30, 2))[2]
    assert error == pytest.approx(best_error(weight, low_rank(40, 30, 2)), abs=1e-12)


def test_equal_eigenvalues_do_not_stop_it(monkeypatch):
    """An identity has nothing but equal singular values, the worst case of Lanczos iteration."""
    monkeypatch.setattr(decompose, "SMALL_SIDE", 100)
    a, b, error = nearest_kronecker(torch.eye(300, dtype=torch.float64), low_rank(300, 300, 3))
    assert error == pytest.approx(0.99**0.5, abs=1e-9)
    assert error == pytest.approx(true_error(torch.eye(300), a, b), abs=1e-9)


@pytest.mark.parametrize("spec", ["2:3000x4*1x8", "2:2x1*1500x32", "3:3000x1*1x32", "1:10x4*300x8"])
def test_a_large_matrix_is_never_widened_whole(spec, monkeypatch):
    shape = KroneckerShape.parse(spec)
    weight = matrix(shape, torch.float32)
    whole = nearest_kronecker(weight, shape)
    sizes = []
    chunks = decompose._chunks

    def seen(tall):
        for part in chunks(tall):
            sizes.append(part.numel())
            yield part

    monkeypatch.setattr(decompose, "CHUNK", 5000)
    monkeypatch.setattr(decompose, "_chunks", seen)
    monkeypatch.setattr(torch.Tensor, "double", _small_double)
    in_chunks = nearest_kronecker(weight, shape)
    # Read for the Gram matrix, for the other side, and, when the fit is exact, for its error.
    assert sum(sizes) == (3 if shape.rank == shape.full_rank else 2) * weight.numel()
    assert max(sizes) <= 5000
    assert in_chunks[2] == pytest.approx(whole[2], abs=1e-12)
    torch.testing.assert_close(kron_weight(*in_chunks[:2]), kron_weight(*whole[:2]))


def _small_double(tensor):
    assert tensor.numel() <= 5000
    return tensor.to(torch.float64)


def test_parameters_are_read_without_gradients():
    weight = torch.nn.Parameter(torch.randn(600, 300))
    a, b, _ = nearest_kronecker(weight, low_rank(600, 300, 2))
    assert not a[0].requires_grad
    assert not b[0].requires_grad


def test_a_transposed_weight_is_read_in_place():
    shape = KroneckerShape(6, 5, 4, 7, 2)
    weight = torch.randn(35, 24, dtype=torch.float64)
    assert nearest_kronecker(weight.T, shape)[2] == pytest.approx(
        nearest_kronecker(weight.T.contiguous(), shape)[2], abs=1e-14
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(bad, dtype):
    weight = torch.ones(6, 8, dtype=dtype)
    weight[3, 2] = bad
    with pytest.raises(ShapeError, match="the weight holds NaN or infinity, expected"):
        nearest_kronecker(weight, KroneckerShape(3, 4, 2, 2))


@pytest.mark.parametrize(
    ("weight", "shapes", "text"),
    [
        (torch.ones(6), KroneckerShape(3, 4, 2, 2), "a weight (6,) of torch.float32: expected a"),
        (torch.ones(6, 8).long(), KroneckerShape(3, 4, 2, 2), "of torch.int64: expected a float"),
        (torch.ones(6, 8), KroneckerShape(4, 4, 2, 2), "a_out=4 does not divide out_features=6"),
        (torch.ones(6, 8), [], "expected at least one Kronecker shape"),
        (torch.ones(6, 8), "3x4*2x2", "is a str, expected a KroneckerShape"),
    ],
)
def test_what_does_not_fit(weight, shapes, text):
    with pytest.raises(ShapeError, match="^nearest_kronecker: .*" + re.escape(text)):
        nearest_kronecker(weight, shapes)


@pytest.mark.parametrize("spec", SHAPES)
def test_a_term_of_size_zero_can_still_learn(spec):
    shape = KroneckerShape.parse(f"2:{spec}")
    (a,), (b,), _ = nearest_kronecker(torch.zeros(shape.out_features, shape.in_features), [shape])
    assert not kron_weight([a], [b]).any()
    pair = [t.clone().requires_grad_() for t in (a, b)]
    torch.manual_seed(0)
    (kron_weight([pair[0]], [pair[1]]) * torch.randn(kron_weight([a], [b]).shape)).sum().backward()
    assert any(t.grad.abs().max() > 0 for t in pair)
