"""The linear kernels against the float64 definition, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kronbert import reference
from kronbert.errors import ShapeError
from kronbert.presets import PRESETS
from kronbert.shapes import KroneckerShape

pytest.importorskip("triton", reason="Triton is published for Linux only")
import triton
import triton.language as tl

from kronbert.kernels import linear_backward as backward_kernels
from kronbert.kernels import small_big
from kronbert.kernels.gelu import activate, activate_grad
from kronbert.kernels.linear import launches, linear, qkv, shape_of
from kronbert.kernels.linear_backward import linear_backward, qkv_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 as raw bits.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

# Each family at sizes all different: a wrong stride cannot hide.
SHAPES = {
    "a small, big first": "16x2*12x24",
    "a small, small first": "2x16*40x12",
    "b small, small first": "24x6*2x16",
    "b small, big first": "4:24x40*8x2",
    "b small, rank 4": "4:24x40*2x8",
    "b square": "48x80*2x2",
    "b of a side no power of two": "21x5*3x7",
    "a of a side no power of two": "3x7*21x5",
    "b small, big first, odd": "3:40x20*6x3",
    "balanced": "48x24*16x32",
    "balanced, a first": "24x96*64x8",
    "odd, rank 2": "2:30x20*21x5",
    "8x8": "24x40*8x8",
    "low rank": "20:48x1*1x80",
    "low rank, odd": "3:35x1*1x21",
    "more terms than one launch sums": "10:8x2*24x40",
    "low rank in two launches": "300:40x1*1x24",
    "low rank, turned": "20:1x80*48x1",
    "one entry": "1x1*7x5",
}
PRESET_SPECS = {
    layer.shape(out, inner, name).spec
    for preset in PRESETS.values()
    for name, layer, out, inner in (
        ("attention", preset.attention, 768, 768),
        ("expand", preset.expand, 3072, 768),
        ("contract", preset.contract, 768, 3072),
    )
}
WIDTH_384 = {
    layer.shape(out, inner, name).spec
    for preset in PRESETS.values()
    for name, layer, out, inner in (
        ("attention", preset.attention, 384, 384),
        ("expand", preset.expand, 1536, 384),
        ("contract", preset.contract, 384, 1536),
    )
}


def matrices(spec, dtype):
    """a, b, bias of a shape such that outputs are about 1."""
    shape = KroneckerShape.parse(spec)
    scale = (shape.rank * shape.in_features) ** -0.25
    a = torch.randn(shape.rank, shape.a_out, shape.a_in) * scale
    b = torch.randn(shape.rank, shape.b_out, shape.b_in) * scale
    bias = torch.randn(shape.out_features)
    return [tensor.to(DEVICE, dtype) for tensor in (a, b, bias)]


def rows(n, width, dtype):
    return torch.randn(n, width).to(DEVICE, dtype)


def defined(x, a, b, bias, activation):
    """The definition in x's dtype, in eager PyTorch."""
    y = reference.kron_linear(x, a, b, bias)
    return y if activation is None else F.gelu(y)


def double(value):
    if isinstance(value, list | tuple):
        return [double(one) for one in value]
    return value if value is None else value.detach().double()


def rms(tensor):
    return tensor.double().pow(2).mean().sqrt()


def assert_rounds_like_eager(found, eager, exact, said=""):
    """At most twice eager's error; the floor is four float32 steps of the result's size."""
    ours, theirs = rms(found.double() - exact), rms(eager.double() - exact)
    floor = 4 * torch.finfo(torch.float32).eps * rms(exact)
    assert ours <= 2 * theirs + floor, f"{said}: off by {ours:.1e}, eager by {theirs:.1e}"


def assert_near(found, exact):
    """Within 1e-5 of the largest number: sums of float32 products."""
    assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def check_forward(spec, n, dtype, activation=None):
    a, b, bias = matrices(spec, dtype)
    x = rows(n, a.shape[2] * b.shape[2], dtype)
    exact = defined(*double((x, a, b, bias)), activation)
    found = linear(x, [a], [b], bias, activation)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert_rounds_like_eager(found, defined(x, a, b, bias, activation), exact, spec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_families(name, dtype):
    check_forward(SHAPES[name], 17, dtype)


def test_shapes_reach_every_family():
    """Of small_big: both orders with either matrix small; slices split and joined, or strided."""
    found = {small_big.sides(KroneckerShape.parse(spec)) for spec in SHAPES.values()}
    assert None in found
    ways = {(side.small_is_b, side.big_first) for side in found if side is not None}
    assert ways == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("spec", sorted(PRESET_SPECS))
def test_presets_at_full_size(spec):
    check_forward(spec, 5, torch.float32)


@pytest.mark.parametrize("spec", sorted(WIDTH_384))
def test_presets_at_384(spec):
    check_forward(spec, 19, torch.float16)


@pytest.mark.parametrize("spec", ["16x2*12x24", "24x6*2x16", "48x24*16x32", "20:48x1*1x80"])
@pytest.mark.parametrize("n", [0, 1, 65, 131])
def test_rows(spec, n):
    """None, one, and one more than tiles hold."""
    if n:
        check_forward(spec, n, torch.float32)
        return
    a, b, bias = matrices(spec, torch.float32)
    x = rows(0, a.shape[2] * b.shape[2], torch.float32)
    assert linear(x, [a], [b], bias, "gelu").shape == (0, bias.numel())
    dx, da, db, dbias = linear_backward(x.new_empty(0, bias.numel()), x, [a], [b], bias)
    assert dx.shape == x.shape
    assert not da[0].any()
    assert not db[0].any()
    assert not dbias.any()
    assert (da[0].shape, db[0].shape) == (a.shape, b.shape)


@pytest.mark.parametrize("spec", ["16x2*12x24", "4:24x40*8x2", "24x6*2x16", "48x24*16x32"])
def test_activation_and_no_bias(spec):
    check_forward(spec, 17, torch.float32, "gelu")
    check_forward(spec, 17, torch.float16, "gelu")
    a, b, bias = matrices(spec, torch.float32)
    x = rows(17, a.shape[2] * b.shape[2], torch.float32)
    fast = linear(x, [a], [b], bias, "gelu_fast")
    torch.testing.assert_close(
        fast.double(), defined(*double((x, a, b, bias)), "gelu"), atol=2e-4, rtol=0
    )
    bare = linear(x, [a], [b])
    torch.testing.assert_close(bare + bias, linear(x, [a], [b], bias), atol=1e-5, rtol=0)


@triton.jit
def activation_kernel(x, y, slope, ACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, activate(tl.load(x + at), ACT))
    tl.store(slope + at, activate_grad(tl.load(x + at), ACT))


@pytest.mark.parametrize(
    ("name", "off", "slope_off"), [("gelu", 5e-7, 5e-7), ("gelu_fast", 1.7e-4, 1e-2)]
)
def test_gelu(name, off, slope_off):
    x = torch.linspace(-20, 20, 1 << 16, device=DEVICE)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    activation_kernel[(4,)](x, y, slope, ACT=name, BLOCK=1 << 14)
    exact_x = x.double().requires_grad_()
    exact = F.gelu(exact_x)
    exact.sum().backward()
    assert (y - exact).abs().max() <= off
    assert (slope - exact_x.grad).abs().max() <= slope_off


def test_fast_gelu_is_exact_in_the_tails_and_its_slope_is_its_own():
    x = torch.tensor([-1e3, -4.5, 4.5, 1e3] * 4, device=DEVICE)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    activation_kernel[(1,)](x, y, slope, ACT="gelu_fast", BLOCK=16)
    assert y[:4].tolist() == [0, 0, 4.5, 1e3]
    assert slope[:4].tolist() == [0, 0, 1, 1]
    x = torch.linspace(-3.9, 3.9, 1 << 12, device=DEVICE)
    step = 1e-2
    (up, down, _), slopes = (torch.empty(3, len(x), device=DEVICE) for _ in range(2))
    activation_kernel[(1,)](x + step, up, slopes[0], ACT="gelu_fast", BLOCK=1 << 12)
    activation_kernel[(1,)](x - step, down, slopes[1], ACT="gelu_fast", BLOCK=1 << 12)
    activation_kernel[(1,)](x, torch.empty_like(x), slopes[2], ACT="gelu_fast", BLOCK=1 << 12)
    inside = x.abs() < 3.9 - step
    difference = (up - down) / (2 * step)
    assert (difference - slopes[2])[inside].abs().max() < 4e-4


def test_a_low_rank_stays_one_turned_round():
    """dx of a low rank is a low rank; taken for another family it would be many small launches."""
    a, b, _ = matrices("300:40x1*1x24", torch.float32)
    found = launches(a.transpose(1, 2), b.transpose(1, 2))
    assert [shape_of(*pair) for pair in found] == [
        KroneckerShape(24, 1, 1, 40, 256),
        KroneckerShape(24, 1, 1, 40, 44),
    ]


def test_groups_are_summed_before_the_activation():
    specs = ("16x2*12x24", "3:192x1*1x48", "2x3*96x16")
    for dtype in (torch.float32, torch.float16):
        parts = [matrices(spec, dtype) for spec in specs]
        a, b, bias = [p[0] for p in parts], [p[1] for p in parts], parts[0][2]
        x = rows(17, 48, dtype)
        exact = defined(*double((x, a, b, bias)), "gelu")
        found = linear(x, a, b, bias, "gelu")
        assert_rounds_like_eager(found, defined(x, a, b, bias, "gelu"), exact, str(dtype))


def gradients(x, a, b, bias, activation, dy):
    """dx, da, db, dbias of the definition by autograd, in the dtype of what it is given."""
    leaves = [one.detach().clone().requires_grad_() for one in (x, *a, *b, bias)]
    k = len(a)
    y = defined(leaves[0], leaves[1 : k + 1], leaves[k + 1 : 2 * k + 1], leaves[-1], activation)
    y.backward(dy)
    return [leaf.grad for leaf in leaves]


def check_backward(specs, dtype, activation=None, n=17):
    parts = [matrices(spec, dtype) for spec in specs]
    a, b, bias = [p[0] for p in parts], [p[1] for p in parts], parts[0][2]
    x = rows(n, a[0].shape[2] * b[0].shape[2], dtype)
    dy = rows(n, bias.numel(), dtype)
    exact = gradients(*double((x, a, b, bias)), activation, double(dy))
    eager = gradients(x, a, b, bias, activation, dy)
    dx, das, dbs, dbias = linear_backward(dy, x, a, b, bias, activation)
    for i, (found, e, d) in enumerate(zip([dx, *das, *dbs, dbias], eager, exact, strict=True)):
        assert found.dtype == dtype
        assert_rounds_like_eager(found, e, d, f"{specs}, gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_backward(name, dtype):
    check_backward([SHAPES[name]], dtype)


@pytest.mark.parametrize("spec", sorted(PRESET_SPECS))
def test_backward_of_presets_at_full_size(spec):
    check_backward([spec], torch.float32, n=3)


@pytest.mark.parametrize("spec", ["16x2*12x24", "24x6*2x16", "48x24*16x32", "20:48x1*1x80"])
def test_backward_through_the_activation(spec):
    check_backward([spec], torch.float32, "gelu")


def test_backward_of_groups():
    check_backward(["16x2*12x24", "3:192x1*1x48"], torch.float32, "gelu")


@pytest.mark.parametrize("missing", range(4))
def test_backward_makes_what_is_needed(missing):
    a, b, bias = matrices("16x2*12x24", torch.float32)
    x, dy = rows(5, 48, torch.float32), rows(5, 192, torch.float32)
    need = [i != missing for i in range(4)]
    found = linear_backward(dy, x, [a], [b], bias, None, tuple(need))
    assert [one is not None for one in found] == need
    for one, other in zip(found, linear_backward(dy, x, [a], [b], bias), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("spec", ["24x6*2x16", "48x80*2x2", "12x24*2x2", "48x24*16x32"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_qkv(spec, with_bias):
    parts = [matrices(spec, torch.float32) for _ in range(3)]
    a, b, bias = ([p[i] for p in parts] for i in range(3))
    x = rows(17, a[0].shape[2] * b[0].shape[2], torch.float32)
    dys = [rows(17, bias[0].numel(), torch.float32) for _ in range(3)]
    found = qkv(x, a, b, bias if with_bias else (None, None, None))
    dx, da, db, dbias = qkv_backward(dys, x, a, b, with_bias)
    assert (dbias is not None) == with_bias
    total = torch.zeros_like(x, dtype=torch.float64)
    for p in range(3):
        shift = bias[p] if with_bias else None
        exact = defined(*double((x, a[p], b[p], shift)), None)
        assert_rounds_like_eager(found[p], defined(x, a[p], b[p], shift, None), exact)
        one = gradients(*double((x, [a[p]], [b[p]], bias[p])), None, double(dys[p]))
        total += one[0]
        assert_near(da[p], one[1])
        assert_near(db[p], one[2])
        if with_bias:
            assert_near(dbias[p], one[3])
    assert_near(dx, total)


def test_qkv_of_many_terms_and_no_rows():
    parts = [matrices("10:8x2*24x40", torch.float32) for _ in range(3)]
    a, b, bias = ([p[i] for p in parts] for i in range(3))
    assert len(launches(a[0], b[0])) > 1
    x = rows(3, 80, torch.float32)
    for p, y in enumerate(qkv(x, a, b, bias)):
        torch.testing.assert_close(y, linear(x, [a[p]], [b[p]], bias[p]), rtol=0, atol=0)
    assert [y.shape for y in qkv(x[:0], a, b, bias)] == [(0, 192)] * 3


def test_the_same_twice(monkeypatch):
    """Bit for bit, with sums over several programs."""
    monkeypatch.setattr(backward_kernels, "PROGRAMS", 4)
    for spec in ("16x2*12x24", "24x6*2x16", "48x24*16x32"):
        a, b, bias = matrices(spec, torch.float16)
        x = rows(133, a.shape[2] * b.shape[2], torch.float16)
        dy = rows(133, bias.numel(), torch.float16)
        before = [one.clone() for one in (dy, x, a, b, bias)]
        first = linear_backward(dy, x, [a], [b], bias, "gelu")
        second = linear_backward(dy, x, [a], [b], bias, "gelu")
        y = linear(x, [a], [b], bias, "gelu")
        assert torch.equal(y, linear(x, [a], [b], bias, "gelu"))
        for one, other in zip(first, second, strict=True):
            one, other = (v[0] if isinstance(v, list) else v for v in (one, other))
            assert torch.equal(one, other)
        for one, other in zip(before, (dy, x, a, b, bias), strict=True):
            assert torch.equal(one, other), "an input was written to"


def test_inner_products_over_several_programs(monkeypatch):
    monkeypatch.setattr(backward_kernels, "PROGRAMS", 4)
    for spec in ("16x2*12x24", "24x6*2x16", "48x24*16x32"):
        check_backward([spec], torch.float32, n=133)


def test_what_does_not_fit_is_refused():
    a, b, bias = matrices("16x2*12x24", torch.float32)
    x = rows(5, 48, torch.float32)
    with pytest.raises(ShapeError, match=r"linear: x \(5, 47\): expected \(rows, 48\)"):
        linear(x[:, :47].contiguous(), [a], [b])
    with pytest.raises(ShapeError, match=r"linear: x \(5, 48\) has strides \(1, 5\)"):
        linear(x.T.contiguous().T, [a], [b])
    with pytest.raises(ShapeError, match=r"bias \(191,\): expected \(192,\)"):
        linear(x, [a], [b], bias[:-1].contiguous())
    with pytest.raises(ShapeError, match="for float64 use kronbert"):
        linear(x.double(), [a.double()], [b.double()])
    with pytest.raises(ShapeError, match=r"another tensor torch\.float16"):
        linear(x, [a], [b.half()])
    with pytest.raises(ShapeError, match="with the same rank"):
        linear(x, [a], [torch.cat([b, b])])
    with pytest.raises(ShapeError, match="1 a and 0 b"):
        linear(x, [a], [])
    with pytest.raises(ShapeError, match="make weights of"):
        linear(x, [a, a], [b, b[:, :6].contiguous()])
    with pytest.raises(ShapeError, match="activation='relu': expected None, 'gelu'"):
        linear(x, [a], [b], activation="relu")
    with pytest.raises(ShapeError, match=r"linear_backward: dy \(5, 48\).*expected \(5, 192\)"):
        linear_backward(x, x, [a], [b])
    with pytest.raises(ShapeError, match="Call linear three times"):
        qkv(x, [a, a, a[:, :8].contiguous()], [b, b, b])
    with pytest.raises(ShapeError, match="2 a, 3 b"):
        qkv(x, [a, a], [b, b, b])
