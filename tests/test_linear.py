"""`KroneckerLinear`: against the dense definition, both ways of conversion, and its refusals."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

from kronbert import KroneckerLinear, KroneckerShape, ShapeError, reference
from kronbert.linear import dense_weight

ONE = KroneckerShape(3, 2, 5, 7, 2)  # 15 x 14
MIXED = (ONE, KroneckerShape(5, 7, 3, 2), KroneckerShape(15, 1, 1, 14, 3))


@pytest.mark.parametrize("groups", [ONE, MIXED], ids=["one group", "three groups"])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_dense_layer_of_its_definition(groups, bias):
    layer = KroneckerLinear(14, 15, groups, bias=bias, dtype=torch.float64)
    weight = sum(
        reference.kron_weight(a, b)
        for a, b in zip(layer.matrices("a"), layer.matrices("b"), strict=True)
    )
    x = torch.randn(2, 4, 14, dtype=torch.float64)
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.to_linear()(x), expected, rtol=0, atol=1e-13)


def test_parameters_and_their_names():
    layer = KroneckerLinear(14, 15, MIXED)
    sizes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert sizes == {
        "a": (2, 3, 2),
        "b": (2, 5, 7),
        "a_1": (1, 5, 7),
        "b_1": (1, 3, 2),
        "a_2": (3, 15, 1),
        "b_2": (3, 1, 14),
        "bias": (15,),
    }
    assert KroneckerLinear(14, 15, ONE, bias=False).bias is None
    assert "2·3x2⊗5x7 + 5x7⊗3x2 + svd(3) 15x14, bias=True" in repr(layer)


@pytest.mark.parametrize("groups", [ONE, MIXED], ids=["one group", "three groups"])
def test_outputs_start_at_the_scale_of_nn_linear(groups):
    x = torch.randn(64, 14)
    found = torch.stack([KroneckerLinear(14, 15, groups, bias=False)(x) for _ in range(200)])
    dense = torch.stack([nn.Linear(14, 15, bias=False)(x) for _ in range(200)])
    assert 0.8 < found.std() / dense.std() < 1.25


def test_full_rank_gives_the_same_layer():
    dense = nn.Linear(14, 15).double()
    layer, error = KroneckerLinear.from_linear(dense, KroneckerShape(3, 2, 5, 7, 6))
    assert error < 1e-12
    back = layer.to_linear()
    torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=1e-13)
    assert torch.equal(back.bias, dense.bias)


def test_the_error_is_that_of_the_weight():
    dense = nn.Linear(14, 15).double()
    layer, error = KroneckerLinear.from_linear(dense, ONE)
    measured = (layer.weight - dense.weight).norm() / dense.weight.norm()
    assert error == pytest.approx(measured.item(), abs=1e-10)


def test_conv1d_both_ways():
    dense = Conv1D(15, 14)
    layer, error = KroneckerLinear.from_conv1d(dense, KroneckerShape(3, 2, 5, 7, 6))
    assert error < 1e-6
    x = torch.randn(3, 14)
    torch.testing.assert_close(layer(x), dense(x))
    back = layer.to_conv1d()
    assert type(back) is Conv1D
    torch.testing.assert_close(back(x), dense(x))
    assert back.weight.is_contiguous()
    assert isinstance(layer.to_linear(), nn.Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtype_mode_and_frozen_state(dtype):
    dense = nn.Linear(14, 15, dtype=dtype).eval()
    dense.weight.requires_grad_(False)
    layer, _ = KroneckerLinear.from_linear(dense, ONE)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    assert not layer.training
    back = layer.to_linear()
    assert (back.weight.dtype, back.weight.requires_grad, back.bias.requires_grad) == (
        dtype,
        False,
        True,
    )
    assert not back.training


def test_does_not_share_memory_with_the_dense_layer():
    dense = nn.Linear(14, 15)
    layer, _ = KroneckerLinear.from_linear(dense, ONE)
    before = layer.bias.detach().clone()
    with torch.no_grad():
        dense.bias.zero_()
        layer.to_linear().bias.zero_()
    assert torch.equal(layer.bias, before)


def test_conversion_takes_no_random_numbers():
    dense = nn.Linear(14, 15)
    state = torch.get_rng_state()
    KroneckerLinear.from_linear(dense, MIXED)[0].to_linear()
    assert torch.equal(torch.get_rng_state(), state)


def test_weight_has_gradients():
    layer = KroneckerLinear(14, 15, MIXED)
    layer.weight.square().sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if n != "bias")


def halved(layer):
    class Half(nn.Module):
        def forward(self, t):
            return t / 2

    parametrize.register_parametrization(layer, "bias", Half())


@pytest.mark.parametrize("change", [prune.l1_unstructured, halved], ids=["pruned", "parametrised"])
def test_a_bias_that_is_no_parameter(change):
    layer, x = KroneckerLinear(14, 15, ONE), torch.randn(3, 14)
    before = layer.bias.detach().clone()
    change(layer, **({} if change is halved else {"name": "bias", "amount": 5}))
    assert "bias" not in layer._parameters
    assert not torch.equal(layer.bias, before)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_merging_rounds_once():
    """In bfloat16 the product is taken in float64: within half a unit of the last place."""
    layer = KroneckerLinear(14, 15, MIXED, dtype=torch.bfloat16)
    exact = dense_weight(layer.matrices("a"), layer.matrices("b"))
    assert exact.dtype == torch.float64
    assert torch.equal(layer.to_linear().weight, exact.to(torch.bfloat16))


def test_on_the_meta_device():
    layer = KroneckerLinear(14, 15, MIXED, device="meta", dtype=torch.float16)
    assert {(p.is_meta, p.dtype) for p in layer.parameters()} == {(True, torch.float16)}


def test_a_shape_that_does_not_fit():
    with pytest.raises(ShapeError, match=r"a_out=4 does not divide out_features=15.*3 and 5"):
        KroneckerLinear(14, 15, KroneckerShape(4, 2, 5, 7))
    with pytest.raises(ShapeError, match="at least one Kronecker shape"):
        KroneckerLinear(14, 15, ())
    dense = nn.Linear(14, 15)
    dense.weight.data[3, 2] = torch.nan
    with pytest.raises(ShapeError, match="NaN or infinity"):
        KroneckerLinear.from_linear(dense, ONE)


def test_a_dense_weight_cannot_be_hung_on_it():
    with pytest.raises(AttributeError, match="KroneckerLinear has no weight of its own"):
        KroneckerLinear(14, 15, ONE).weight = nn.Parameter(torch.zeros(15, 14))
