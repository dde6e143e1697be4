"""The CPU engine's inputs after a call that was kept: layouts, dtypes, refusals, autocast."""

import pytest
import torch
from torch import nn

from kronbert import KroneckerShape, ShapeError, cpu, functional
from kronbert.forms import DENSE
from tests.kept_layers import definition, is_right, new

pytestmark = pytest.mark.usefixtures("nothing_kept")


@torch.no_grad()
def test_layouts(warm):
    x = torch.randn(5, 28)
    for strided in (x.T.contiguous().T, torch.randn(5, 56)[:, ::2], torch.randn(10, 28)[::2]):
        assert not strided.is_contiguous()
        is_right(warm, strided)
    y = torch.randn(2, 3, 28).transpose(0, 1)
    is_right(warm, y)
    assert warm(y).shape == (3, 2, 30)
    is_right(warm, x[0])
    assert warm(x[0]).shape == (30,)
    is_right(warm, torch.randn(1, 28).expand(6, 28))
    assert warm(nn.Parameter(x)).shape == (5, 30)


@torch.no_grad()
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)])
def test_no_rows(leading, pick):
    layer = new()
    for _ in range(2):
        assert layer(torch.randn(*leading, 28)).shape == (*leading, 30)
    assert not cpu._KEPT


@torch.no_grad()
def test_the_input_is_not_written(warm):
    x = torch.randn(5, 28)
    before, bias = x.clone(), warm.bias.clone()
    first = warm(x).clone()
    assert torch.equal(warm(x), first)
    assert torch.equal(x, before)
    assert torch.equal(warm.bias, bias)


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(7, 4), r"input \(7, 4\): expected a last dimension of a_in \* b_in = 4 \* 7"),
        (torch.randn(5, 56), r"input \(5, 56\)"),
        (torch.randn(28, 1), r"input \(28, 1\)"),
        (torch.tensor(1.0), r"input \(\)"),
        (torch.randn(5, 28).bfloat16(), r"the input is torch.bfloat16, a is torch.float32"),
        (torch.randn(5, 28).double(), r"the input is torch.float64, a is torch.float32"),
        (torch.ones(5, 28, dtype=torch.int64), r"input of torch.int64: expected a float"),
        (torch.randn(5, 28, device="meta"), r"the input is on meta, a on cpu"),
    ],
)
def test_wrong_inputs_are_refused(x, said, warm):
    with pytest.raises(ShapeError, match=said):
        warm(x)


@torch.no_grad()
def test_wrong_bias_is_refused(warm):
    x = torch.randn(5, 28)
    for bias, said in ((torch.randn(29), r"bias \(29,\)"), (torch.randn(30).double(), "bias is")):
        warm.bias = nn.Parameter(bias)
        with pytest.raises(ShapeError, match=said):
            warm(x)


@torch.no_grad()
def test_autocast(warm):
    x = torch.randn(5, 28)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            y = warm(x)
            assert y.dtype == torch.bfloat16
            scale = definition(warm, x).abs().max()
            assert (y.double() - definition(warm, x)).abs().max() < 0.02 * scale
    assert warm(x).dtype == torch.float32
    is_right(warm, x)


@torch.no_grad()
def test_autocast_pays_for_fresh_matrices(monkeypatch):
    """The casts are new tensors in every call: nothing made of them is ever used again."""
    asked = []

    def choose(*args, fresh):
        asked.append(fresh)
        return (DENSE,)

    monkeypatch.setattr(cpu, "choose", choose)
    layer, x = new(), torch.randn(5, 28)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        layer(x)
    assert asked == [True, True]
    assert not cpu._KEPT


def test_other_dtypes_and_tensors_are_left_alone():
    a, b = torch.randn(2, 6, 4), torch.randn(2, 5, 7)

    class Own(torch.Tensor):
        pass

    x = torch.randn(3, 28)
    assert cpu.takes(x, [(a, b)])
    assert cpu.takes(x.bfloat16(), [(a, b)])
    assert not cpu.takes(x.half(), [(a, b)])
    assert not cpu.takes(x.double(), [(a, b)])
    assert not cpu.takes(x.to("meta"), [(a, b)])
    assert not cpu.takes(x.as_subclass(Own), [(a, b)])
    assert not cpu.takes(x, [(a, b.as_subclass(Own))])
    assert cpu.in_place(x) is False
    with torch.no_grad():
        assert cpu.in_place(x) is True


@torch.no_grad()
def test_subclasses_take_the_plain_path(warm, monkeypatch):
    class Own(torch.Tensor):
        pass

    x = torch.randn(5, 28)
    monkeypatch.setattr(cpu.Kept, "holds", lambda *args: pytest.fail("asked what is kept"))
    y = warm(x.as_subclass(Own))
    assert type(y) is Own
    is_right(warm, x, y.as_subclass(torch.Tensor))


C_SHAPES = ["384x48*2x16", "4x2*96x384", "2x16*384x192", "16x2*192x384", "96x96*8x8", "2x8*384x96"]


@torch.no_grad()
@pytest.mark.parametrize("spec", C_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_matrices_and_bias(spec, dtype):
    """Those that the kernels in C read by address."""
    torch.manual_seed(0)
    shape = KroneckerShape.parse(spec)
    a, b = torch.randn(1, shape.a_out, shape.a_in), torch.randn(1, shape.b_out, shape.b_in)
    a, b = a.to(dtype), b.to(dtype)
    strided = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (a, b)]
    two = torch.randn(shape.out_features, 2).to(dtype)
    for n in (1, 16, 200):
        x = torch.randn(n, shape.in_features).to(dtype)
        for bias in (two[:, 0], two[:1, 0].expand(shape.out_features)):
            cpu.forget()
            expected = functional.kron_linear(x, a, b, bias.contiguous())
            cpu.forget()
            missed = functional.kron_linear(x, *strided, bias) - expected
            assert missed.norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
