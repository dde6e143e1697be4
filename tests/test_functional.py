"""The plain path against the definitions: every size, dtype, layout and gradient."""

import pytest
import torch
from torch import nn

from kronbert import functional, reference
from kronbert.forms import run
from kronbert.shapes import KroneckerShape
from tests.random_terms import terms

# All sides different, each branch: large b, large a beside a tiny b, low rank, balanced, stumps.
SHAPES = [
    "5x4*2x7",
    "3:5x4*2x7",
    "2x3*16x11",
    "4:2x16*24x6",
    "24x6*2x16",
    "4:24x6*2x16",
    "2:16x24*3x2",
    "24x48*2x3",
    "16x2*12x24",
    "2x16*24x12",
    "1x1*20x30",
    "20x30*1x1",
    "30x1*1x20",
    "4:30x1*1x20",
    "30x5*1x4",
    "2:3x3*5x5",
]
PRESETS = ["384x384*2x2", "384x48*2x16", "8x2*384x384", "2x8*384x384", "16x2*192x384"]
PRESETS += ["2x16*384x192", "4:384x48*2x16", "4:384x384*2x8", "2:48x48*16x16", "4:32x2*96x384"]
MIXED = ["24x6*2x16", "2:48x1*1x96", "4x8*12x12"]
ENGINES = ["factored", "rebuilt", "cpu"]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """The two forms of the plain path, whatever the sizes say, and the CPU engine."""
    if request.param != "cpu":
        monkeypatch.setattr(functional.cpu, "takes", lambda *args: False)
        least = 0.0 if request.param == "factored" else 10.0**9
        monkeypatch.setattr(functional, "WORTH", {})
        monkeypatch.setattr(functional, "WORTH_HALF", least)
    else:  # the engine leaves float64, in which these tests compare, to the plain path
        monkeypatch.setitem(functional.cpu.DTYPES, torch.float64, "float32")
    return request.param


def mixed(dtype=torch.float64):
    pairs = [terms(spec, dtype) for spec in MIXED]
    return [a for a, _ in pairs], [b for _, b in pairs]


def inputs(shape, *leading, dtype=torch.float64):
    return torch.randn(*leading, shape.in_features, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("spec", SHAPES)
def test_linear_is_its_definition(spec, engine):
    shape = KroneckerShape.parse(spec)
    a, b = terms(spec)
    x, bias = inputs(shape, 9), torch.randn(shape.out_features, dtype=torch.float64)
    expected = reference.kron_linear(x, a, b, bias)
    torch.testing.assert_close(functional.kron_linear(x, a, b, bias), expected)
    torch.testing.assert_close(functional.kron_linear(x, a, b), expected - bias)
    torch.testing.assert_close(functional.factored_product(x, a, b), expected - bias)
    torch.testing.assert_close(functional.rebuild_weight(a, b), reference.kron_weight(a, b))


@pytest.mark.parametrize("spec", PRESETS)
def test_linear_at_the_papers_sizes(spec):
    shape = KroneckerShape.parse(spec)
    a, b = terms(spec)
    x = inputs(shape, 3)
    expected = reference.kron_linear(x, a, b)
    torch.testing.assert_close(functional.kron_linear(x, a, b), expected)
    torch.testing.assert_close(functional.factored_product(x, a, b), expected)


def test_groups_of_different_shapes(engine):
    a, b = mixed()
    x, bias = torch.randn(9, 96, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    torch.testing.assert_close(
        functional.kron_linear(x, a, b, bias), reference.kron_linear(x, a, b, bias)
    )
    torch.testing.assert_close(functional.rebuild_weight(a, b), reference.kron_weight(a, b))
    torch.testing.assert_close(
        functional.kron_linear(x, tuple(a), tuple(b)), reference.kron_linear(x, a, b)
    )


@pytest.mark.parametrize("leading", [(), (0,), (1,), (3, 0), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("spec", ["2:24x6*2x16", "2:2x16*24x6", "2:30x1*1x20", "24x48*2x3"])
def test_leading_dimensions(spec, leading, engine):
    shape = KroneckerShape.parse(spec)
    a, b = (t.requires_grad_() for t in terms(spec))
    x = inputs(shape, *leading).requires_grad_()
    y = functional.kron_linear(x, a, b)
    assert y.shape == (*leading, shape.out_features)
    torch.testing.assert_close(y, reference.kron_linear(x, a, b))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert bool(a.grad.any()) == (y.numel() > 0)


@pytest.mark.parametrize("spec", ["24x6*2x16", "2:2x16*24x6", "30x1*1x20"])
def test_strides(spec, engine):
    shape = KroneckerShape.parse(spec)
    a, b = terms(spec)
    a, b = a.transpose(1, 2).contiguous().transpose(1, 2), b.repeat_interleave(2, 2)[:, :, ::2]
    for x in (
        inputs(shape, 5, 3).transpose(0, 1),
        torch.randn(shape.in_features, 7, dtype=torch.float64).T,
        inputs(shape, 1).expand(4, -1),
        torch.randn(4, 2 * shape.in_features, dtype=torch.float64)[:, ::2],
    ):
        assert not x.is_contiguous()
        torch.testing.assert_close(functional.kron_linear(x, a, b), reference.kron_linear(x, a, b))


def test_parameters_and_saved_tensors(engine):
    """nn.Parameter in, gradients out, and nothing that was handed over is written to."""
    a, b = (nn.Parameter(t) for t in terms("2:24x6*2x16"))
    x, bias = torch.randn(4, 96, dtype=torch.float64), nn.Parameter(torch.zeros(48).double())
    versions = [t._version for t in (x, a, b, bias)]
    functional.kron_linear(x, a, b, bias).square().sum().backward()
    assert [t._version for t in (x, a, b, bias)] == versions
    assert all(t.grad.any() for t in (a, b, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [*PRESETS[1:6], "4:2x16*24x6", "4:30x1*1x20", "2:48x48*16x16"])
def test_linear_rounds_no_worse_than_eager(spec, dtype):
    """Root mean square over all outputs, against the dense weight made and used in that dtype."""
    shape = KroneckerShape.parse(spec)
    a, b = terms(spec, dtype)
    x = inputs(shape, 16, dtype=dtype) / shape.in_features**0.5
    exact = reference.kron_linear(x.double(), a.double(), b.double())
    eager = (reference.kron_linear(x, a, b).double() - exact).square().mean().sqrt()
    for name in ("kron_linear", "factored_product"):
        ours = (getattr(functional, name)(x, a, b).double() - exact).square().mean().sqrt()
        assert ours <= 2 * eager, f"{name} {spec} {dtype}: off by {ours:.1e}, eager {eager:.1e}"


@pytest.mark.parametrize("spec", ["2:3x2*2x5", "5x4*2x3", "2:5x4*2x3", "2:6x1*1x5", "2x3*4x5"])
def test_gradients(spec, engine):
    shape = KroneckerShape.parse(spec)
    given = [inputs(shape, 2), *terms(spec), torch.randn(shape.out_features, dtype=torch.float64)]
    given = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(functional.kron_linear, given)
    assert torch.autograd.gradgradcheck(functional.kron_linear, given)


@pytest.mark.parametrize("spec", ["24x6*2x16", "4:2x16*24x6", "30x1*1x20"])
def test_autocast_is_casting_by_hand(spec):
    shape = KroneckerShape.parse(spec)
    a, b = (t.requires_grad_() for t in terms(spec, torch.float32))
    x, bias = torch.randn(5, shape.in_features), torch.randn(shape.out_features)
    half = [t.bfloat16() for t in (x, a, b, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.kron_linear(x, a, b, bias)
        logits = functional.kron_logits(x, a.transpose(0, 1), b, bias)
        wide = functional.kron_linear(x.double(), a.double(), b.double(), bias.double())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, functional.kron_linear(*half))
    assert torch.equal(
        logits, functional.kron_logits(half[0], half[1].transpose(0, 1), half[2], half[3])
    )
    assert wide.dtype == torch.float64  # autocast leaves it alone, in nn.Linear too
    y.float().sum().backward()
    assert a.grad.dtype == torch.float32


@pytest.mark.parametrize("spec", ["4:24x6*2x16", "2:2x16*24x6", "24x48*2x3", "2:30x1*1x20"])
def test_compile_forward_and_backward(spec):
    shape = KroneckerShape.parse(spec)
    # float64: where eager runs the compiler's form too, so only rounding of one sum differs.
    given = [torch.randn(3, 5, shape.in_features).double(), *terms(spec)]
    given = [t.requires_grad_() for t in given]
    compiled = torch.compile(functional.kron_linear, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(functional.kron_linear(*given).square().sum(), given)
    found = torch.autograd.grad(compiled(*given).square().sum(), given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Everything(nn.Module):
    """A lookup, a product of mixed groups and logits, as a model has them."""

    def __init__(self):
        super().__init__()
        a, b = terms("2:40x24*1x4", torch.float32)
        self.table_a, self.table_b = nn.Parameter(a.transpose(0, 1).contiguous()), nn.Parameter(b)
        a, b = mixed(torch.float32)
        self.a, self.b = nn.ParameterList(a), nn.ParameterList(b)
        back = terms("2:24x6*4x8", torch.float32)
        self.back_a, self.back_b = (nn.Parameter(t) for t in back)

    def forward(self, ids):
        h = functional.kron_embedding(ids, self.table_a, self.table_b, padding_idx=0)
        h = functional.kron_linear(h, list(self.a), list(self.b))
        h = functional.kron_linear(h, self.back_a, self.back_b)
        return functional.kron_logits(h, self.table_a, self.table_b)


def test_compile_all_of_it():
    model, ids = Everything(), torch.tensor([[0, 3, 39], [4, 4, 0]])
    expected = model(ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), expected, rtol=1e-4, atol=1e-2)
    compiled(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_compile_with_the_default_backend():
    given = [torch.randn(3, 96), *terms("2:24x6*2x16", torch.float32)]
    given = [t.requires_grad_() for t in given]
    compiled = torch.compile(functional.kron_linear, fullgraph=True)
    expected = torch.autograd.grad(functional.kron_linear(*given).square().sum(), given)
    found = torch.autograd.grad(compiled(*given).square().sum(), given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_export_with_a_free_batch():
    model, ids = Everything().eval(), torch.tensor([[0, 3, 39], [4, 4, 0]])
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: rows},))
    other = torch.tensor([[1, 2, 3]] * 5)
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("spec", "dtype", "expected"),
    [
        # 2.0, 3.9 and 1.4 times fewer FLOPs: float32 from 1.5 on, bfloat16 from 2.5.
        ("384x384*2x2", torch.float32, "b:rows+turn"),
        ("384x384*2x2", torch.bfloat16, "dense"),
        ("4:384x48*2x16", torch.float32, "b:rows+turn"),
        ("4:384x48*2x16", torch.bfloat16, "b:rows+turn"),
        ("11:384x48*2x16", torch.float32, "dense"),
        ("2x16*384x192", torch.bfloat16, "a:mix+rows"),
        ("16x2*192x384", torch.bfloat16, "b:rows+mix"),
        ("700:768x1*1x768", torch.float32, "b:rows+rows"),
    ],
)
def test_the_form_that_follows_from_the_sizes(spec, dtype, expected, monkeypatch):
    """What runs where the engine does not: while compiling, or in other dtypes."""
    taken = []
    monkeypatch.setattr(functional.cpu, "takes", lambda *args: False)
    monkeypatch.setattr(
        functional, "run", lambda form, *args: (taken.append(str(form)), run(form, *args))[1]
    )
    a, b = terms(spec, dtype)
    x = torch.randn(2, 768 if a.shape[2] * b.shape[2] == 768 else 3072).to(dtype)
    functional.kron_linear(x, a, b)
    assert taken == [expected]
