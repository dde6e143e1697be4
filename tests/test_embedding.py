"""`KroneckerEmbedding`: against the dense table, both ways of conversion, padding."""

import copy
import pickle

import pytest
import torch
from torch import nn

from kronbert import KroneckerEmbedding, KroneckerShape, ShapeError, reference

WORD = KroneckerShape(30, 4, 1, 3, 2)  # 30 x 12
MIXED = (WORD, KroneckerShape(30, 1, 1, 12, 2))
SHARED = KroneckerShape(10, 4, 3, 3, 2)  # entries in threes share a row of a


def table_of(layer):
    return sum(
        reference.kron_weight(a.transpose(0, 1), b)
        for a, b in zip(layer.matrices("a"), layer.matrices("b"), strict=True)
    )


@pytest.mark.parametrize("groups", [WORD, MIXED, SHARED], ids=["one", "two", "shared rows"])
def test_is_the_dense_table_of_its_definition(groups):
    layer = KroneckerEmbedding(30, 12, groups, dtype=torch.float64)
    ids = torch.tensor([[0, 29, 7], [7, 1, 28]])
    expected = table_of(layer)[ids]
    torch.testing.assert_close(layer(ids), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.weight, table_of(layer), rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.to_embedding()(ids), expected, rtol=0, atol=1e-13)


def test_parameters_one_row_per_entry():
    layer = KroneckerEmbedding(30, 12, MIXED, padding_idx=-1)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "a": (30, 2, 4),
        "b": (2, 1, 3),
        "a_1": (30, 2, 1),
        "b_1": (2, 1, 12),
    }
    assert layer.padding_idx == 29
    assert "30, 12, 2·30x4⊗1x3 + svd(2) 30x12, padding_idx=29" in repr(layer)


def test_starts_at_the_scale_of_nn_embedding_with_a_zero_for_padding():
    layer = KroneckerEmbedding(3000, 12, KroneckerShape(3000, 4, 1, 3, 8), padding_idx=5)
    found = layer(torch.arange(3000))
    assert 0.6 < found.std() < 1.6
    assert not layer(torch.tensor([5])).any()


def test_full_rank_gives_the_same_table():
    dense = nn.Embedding(30, 12, padding_idx=4).double()
    layer, error = KroneckerEmbedding.from_embedding(dense, KroneckerShape(30, 4, 1, 3, 3))
    assert error < 1e-12
    back = layer.to_embedding()
    torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=1e-13)
    assert back.padding_idx == 4


def test_padding_rows_get_no_gradient():
    layer = KroneckerEmbedding(30, 12, MIXED, padding_idx=4)
    layer(torch.tensor([4, 4, 9])).sum().backward()
    assert not layer.a.grad[4].any()
    assert layer.a.grad[9].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtype_mode_and_frozen_state(dtype):
    dense = nn.Embedding(30, 12, dtype=dtype).eval()
    dense.weight.requires_grad_(False)
    layer, _ = KroneckerEmbedding.from_embedding(dense, MIXED)
    assert {(p.dtype, p.requires_grad) for p in layer.parameters()} == {(dtype, False)}
    back = layer.to_embedding()
    assert (back.weight.dtype, back.weight.requires_grad) == (dtype, False)
    assert not layer.training
    assert not back.training


def test_conversion_takes_no_random_numbers():
    dense = nn.Embedding(30, 12)
    state = torch.get_rng_state()
    KroneckerEmbedding.from_embedding(dense, WORD)[0].to_embedding()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_ids_at_all():
    assert KroneckerEmbedding(30, 12, WORD)(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 12)


def test_refusals():
    with pytest.raises(ShapeError, match=r"entries share rows.*b_out = 1"):
        KroneckerEmbedding(30, 12, SHARED, padding_idx=0)
    with pytest.raises(ShapeError, match="padding_idx=30: expected an entry of the table"):
        KroneckerEmbedding(30, 12, WORD, padding_idx=30)
    with pytest.raises(ShapeError, match="a_out=7 does not divide"):
        KroneckerEmbedding(30, 12, KroneckerShape(7, 4, 1, 3))
    with pytest.raises(ShapeError, match=r"KroneckerEmbedding: .*starts at row 4: expected 0"):
        KroneckerEmbedding(30, 12, KroneckerShape(26, 1, 1, 12, start=4))


BLOCKS = (
    KroneckerShape(30, 1, 1, 12, 2),
    KroneckerShape(7, 1, 1, 12, 3, start=4),
    KroneckerShape(9, 2, 1, 6, 1, start=21),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_rows_are_fitted_and_the_dense_table_stays(dtype):
    dense = nn.Embedding(30, 12, padding_idx=5, dtype=dtype)
    before = dense.weight.detach().clone()
    layer, error = KroneckerEmbedding.from_embedding(dense, BLOCKS)
    assert torch.equal(dense.weight, before)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        **{"a": (30, 2, 1), "a_1": (7, 3, 1), "a_2": (9, 1, 2)},
        **{"b": (2, 1, 12), "b_1": (3, 1, 12), "b_2": (1, 1, 6)},
    }
    assert "svd(2) 30x12 + svd(3) 7x12@4 + 9x2⊗1x6@21, padding_idx=5" in repr(layer)
    back = layer.to_embedding()
    assert (back.weight.dtype, back.padding_idx) == (dtype, 5)
    missed = (back.weight.double() - before.double()).norm() / before.double().norm()
    near = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert error == pytest.approx(missed.item(), rel=near)
    assert error < KroneckerEmbedding.from_embedding(dense, BLOCKS[0])[1]
    ids = torch.arange(30)
    for found in (layer(ids), layer.weight):
        torch.testing.assert_close(found, back.weight, rtol=near, atol=near)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(again(ids), layer(ids))


def test_blocks_with_shared_rows_work_but_are_not_fitted():
    groups = (SHARED, KroneckerShape(3, 4, 2, 3, 2, start=5))
    layer = KroneckerEmbedding(30, 12, groups, dtype=torch.float64)
    torch.testing.assert_close(layer(torch.arange(30)), layer.to_embedding().weight)
    with pytest.raises(ShapeError, match=r"@5: to fit a table with blocks .* needs b_out = 1"):
        KroneckerEmbedding.from_embedding(nn.Embedding(30, 12), groups)


def test_rows_without_a_block_start_at_the_scale_of_nn_embedding():
    groups = (KroneckerShape(3000, 1, 1, 12, 8), KroneckerShape(500, 1, 1, 12, 8, start=999))
    found = KroneckerEmbedding(3000, 12, groups).to_embedding().weight
    assert 0.8 < found[1499:].std() < 1.25
    assert found[999:1499].std() > 1.1 * found[1499:].std()


@pytest.mark.parametrize("groups", [BLOCKS, BLOCKS[0]], ids=["blocks", "one group"])
def test_a_table_with_nan_is_refused(groups):
    shape = BLOCKS[0]
    dense = nn.Embedding(shape.out_features, shape.in_features)
    with torch.no_grad():
        dense.weight[3, 1] = torch.nan
    with pytest.raises(ShapeError, match="NaN or infinity, expected finite numbers"):
        KroneckerEmbedding.from_embedding(dense, groups)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_holds_with_and_without_gradients():
    """jit.trace's own check makes a second trace without them."""
    table = KroneckerEmbedding(30, 12, KroneckerShape(30, 1, 1, 12, 4), padding_idx=0)
    ids = torch.tensor([[0, 3], [29, 0]])
    traced = torch.jit.trace(table, (ids,))
    assert torch.equal(traced(ids), table(ids))
    traced(ids).sum().backward()
    assert not table.a.grad[0].any()
    assert table.a.grad[3].any()
