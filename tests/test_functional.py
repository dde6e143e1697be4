"""The plain path against the definitions: every size, dtype, layout, gradient, and refusal."""

import re

import pytest
import torch
from torch import nn

from kronbert import functional, reference
from kronbert.errors import ShapeError
from kronbert.forms import run
from kronbert.shapes import KroneckerShape

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


def terms(spec, dtype=torch.float64, scale=1.0):
    shape = KroneckerShape.parse(spec) if isinstance(spec, str) else spec
    a = scale * torch.randn(shape.rank, shape.a_out, shape.a_in, dtype=torch.float64)
    b = torch.randn(shape.rank, shape.b_out, shape.b_in, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_round_no_worse_than_eager(dtype):
    a, b = terms("3:50x6*1x4", dtype)
    ids, h = torch.arange(50), torch.randn(7, 24).to(dtype)
    table = a.transpose(0, 1).contiguous()
    for name, one, ours in (
        ("kron_embedding", ids, functional.kron_embedding(ids, table, b)),
        ("kron_logits", h, functional.kron_logits(h, table, b)),
    ):
        define = getattr(reference, name)
        wide = one.double() if one.is_floating_point() else one
        exact = define(wide, a.double(), b.double())
        eager = (define(one, a, b).double() - exact).square().mean().sqrt()
        off = (ours.double() - exact).square().mean().sqrt()
        assert off <= 2 * eager, f"{name} {dtype}: off by {off:.1e}, eager by {eager:.1e}"


@pytest.mark.parametrize("spec", ["2:3x2*2x5", "5x4*2x3", "2:5x4*2x3", "2:6x1*1x5", "2x3*4x5"])
def test_gradients(spec, engine):
    shape = KroneckerShape.parse(spec)
    given = [inputs(shape, 2), *terms(spec), torch.randn(shape.out_features, dtype=torch.float64)]
    given = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(functional.kron_linear, given)
    assert torch.autograd.gradgradcheck(functional.kron_linear, given)


def test_gradients_of_tables():
    ids = torch.tensor([0, 3, 3, 5])
    for spec in ("2:6x2*1x3", "2:3x2*2x3"):
        a, b = terms(spec)
        a, b = a.transpose(0, 1).contiguous().requires_grad_(), b.requires_grad_()
        lookup = lambda a, b: functional.kron_embedding(ids, a, b)  # noqa: E731
        assert torch.autograd.gradcheck(lookup, (a, b))
        assert torch.autograd.gradgradcheck(lookup, (a, b))
        h = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(functional.kron_logits, (h, a, b))
        assert torch.autograd.gradgradcheck(functional.kron_logits, (h, a, b))


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


def test_autocast_of_an_embedding():
    a, b = terms("3:50x6*1x4", torch.float32)
    ids, a = torch.tensor([[1, 2, 49]]), a.transpose(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.kron_embedding(ids, a, b)
    assert torch.equal(found, functional.kron_embedding(ids, a.bfloat16(), b.bfloat16()))


@pytest.mark.parametrize(
    "spec", ["50x6*1x4", "3:50x6*1x4", "7:50x1*1x24", "2:10x6*5x4", "5x3*10x8"]
)
def test_embedding_and_logits_are_their_definitions(spec):
    a, b = terms(spec)
    table = a.transpose(0, 1)
    bias = torch.randn(50, dtype=torch.float64)
    for ids in (
        torch.tensor([[0, 49, 7], [7, 7, 3]]),
        torch.tensor(5),
        torch.tensor([2, 4], dtype=torch.int32),
        torch.arange(6).view(2, 3).T,
        torch.empty(0, dtype=torch.long),
        torch.empty(2, 0, dtype=torch.long),
    ):
        found = functional.kron_embedding(ids, table, b)
        torch.testing.assert_close(found, reference.kron_embedding(ids.long(), a, b))
    for h in (torch.randn(2, 3, 24), torch.randn(24), torch.randn(0, 24), torch.randn(24, 4).T):
        h = h.double()
        found = functional.kron_logits(h, table, b, bias)
        torch.testing.assert_close(found, reference.kron_logits(h, a, b, bias))


def test_groups_of_a_table():
    pairs = [terms("2:10x6*5x4"), terms("3:50x1*1x24")]
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    table, ids = [one.transpose(0, 1) for one in a], torch.tensor([0, 49, 23])
    found = functional.kron_embedding(ids, table, b)
    torch.testing.assert_close(found, reference.kron_embedding(ids, a, b))
    h = torch.randn(4, 24, dtype=torch.float64)
    torch.testing.assert_close(functional.kron_logits(h, table, b), reference.kron_logits(h, a, b))


@pytest.mark.parametrize("spec", ["2:6x2*1x3", "2:3x2*2x3"])
@pytest.mark.parametrize("padding_idx", [4, -2])
def test_the_padding_entry_gives_no_gradient(spec, padding_idx):
    """As `nn.Embedding`: the same rows, and gradients as if the padding were not there."""
    a, b = terms(spec)
    a, b = a.transpose(0, 1).contiguous().requires_grad_(), b.requires_grad_()
    ids = torch.tensor([[4, 1, 4], [5, 4, 0]])
    found = functional.kron_embedding(ids, a, b, padding_idx)
    assert torch.equal(found, functional.kron_embedding(ids, a, b))
    grads = torch.autograd.grad(found.square().sum(), (a, b))
    without = functional.kron_embedding(ids[ids != 4], a, b).square().sum()
    for ours, expected in zip(grads, torch.autograd.grad(without, (a, b)), strict=True):
        torch.testing.assert_close(ours, expected)
    if b.shape[1] == 1:
        assert not grads[0][4].any()


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
    ("call", "text"),
    [
        (
            lambda x, a, b: functional.kron_linear(x[:, :-1], a, b),
            "kron_linear: input (4, 95): expected a last dimension of a_in * b_in = 6 * 16 = 96. "
            "Check which layer it comes from.",
        ),
        (lambda x, a, b: functional.kron_linear(x[0, 0], a, b), "kron_linear: input ()"),
        (
            lambda x, a, b: functional.kron_linear(x.long(), a, b),
            "kron_linear: input of torch.int64: expected a float",
        ),
        (
            lambda x, a, b: functional.kron_linear(x.half(), a, b),
            "kron_linear: the input is torch.float16, a is torch.float32. Cast one of them: "
            "input.to(torch.float32) or module.to(torch.float16)",
        ),
        (
            lambda x, a, b: functional.kron_linear(x, a, b.double()),
            "the input is torch.float32, b is torch.float64",
        ),
        (
            lambda x, a, b: functional.kron_linear(x, a, b, torch.zeros(48).double()),
            "the input is torch.float32, bias is torch.float64",
        ),
        (
            lambda x, a, b: functional.kron_linear(x, a, b, torch.zeros(1)),
            "kron_linear: bias (1,): expected (48,), one number per output",
        ),
        (
            lambda x, a, b: functional.kron_linear(x, [a], [b, b]),
            "expected a and b as two tensors, or as two sequences of as many groups",
        ),
        (lambda x, a, b: functional.kron_linear(x, [a], b), "two sequences of as many groups"),
        (lambda x, a, b: functional.kron_linear(x, [], []), "two sequences of as many groups"),
        (
            lambda x, a, b: functional.kron_linear(x, a, b.repeat(2, 1, 1)),
            "expected a (rank, a_out, a_in) and b (rank, b_out, b_in) with the same rank",
        ),
        (lambda x, a, b: functional.kron_linear(x, a[0], b[0]), "One term needs rank 1: unsqueeze"),
        (
            lambda x, a, b: functional.kron_linear(x, [a, a[:, :-1]], [b, b]),
            "the groups make weights of 48x96 and 46x96: expected one size",
        ),
        (
            lambda x, a, b: functional.kron_linear(x.to("meta"), a, b),
            "the input is on meta, a on cpu. Move one of them",
        ),
        (
            lambda x, a, b: functional.kron_logits(x[:, 1:], a.transpose(0, 1), b),
            "kron_logits: input (4, 95): expected a last dimension",
        ),
        (
            lambda x, a, b: functional.kron_logits(x, a, b),
            "kron_logits: a (1, 24, 6), b (1, 2, 16): expected a (a_out, rank, a_in)",
        ),
        (
            lambda x, a, b: functional.kron_embedding(x, a.transpose(0, 1), b),
            "kron_embedding: ids of torch.float32: expected integers. Call ids.long()",
        ),
        (
            lambda x, a, b: functional.kron_embedding(x > 0, a.transpose(0, 1), b),
            "kron_embedding: ids of torch.bool: expected integers",
        ),
    ],
)
def test_what_does_not_fit(call, text):
    a, b = terms("24x6*2x16", torch.float32)
    with pytest.raises(ShapeError, match=re.escape(text)):
        call(torch.randn(4, 96), a, b)


@pytest.mark.parametrize("spec", ["6x2*1x3", "3x2*2x3"])
@pytest.mark.parametrize("wrong", [6, -1])
def test_an_id_outside_the_table(spec, wrong):
    a, b = terms(spec)
    with pytest.raises(IndexError):
        functional.kron_embedding(torch.tensor([0, wrong]), a.transpose(0, 1), b)


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
