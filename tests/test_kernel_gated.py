"""The kernels and ops of layers that norm before their halves: the gate of a GeGLU layer, and a sum
given out with its LayerNorm. Against float64 definitions and eager PyTorch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kronbert import blocks, cuda, functional, reference
from kronbert.errors import KronbertError, ShapeError
from kronbert.op_add_norm import add_norm
from kronbert.op_gated import gated

pytest.importorskip("triton", reason="Triton is published for Linux only")

from kronbert.kernels import gated as gate
from kronbert.kernels import norm

DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies bfloat16 wrongly
EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*size, dtype=torch.float32, scale=1.0):
    return (torch.randn(*size) * scale).to(DEVICE, dtype)


def seed(number=7):
    return torch.tensor([number], device=DEVICE)


def mask_of(n, width, p):
    """What the norm kernel's dropout multiplies each place by: one mask for all kernels."""
    if not p:
        return torch.ones(n, width, device=DEVICE)
    ones, weight = torch.ones(n, width, device=DEVICE), torch.ones(width, device=DEVICE)
    out = norm.residual_norm(ones, None, weight, None, EPS, p=p, seed=seed(), keep=True)
    assert out.total is not None
    return out.total


def rms(error):
    return error.double().pow(2).mean().sqrt().item() if error.numel() else 0.0


def check(found, definition, tensors, grads, floor):
    """found: outputs, then gradients of ``tensors``, against ``definition(*tensors)`` in float64;
    at most twice as far off as eager PyTorch in the tensors' dtype."""
    results = []
    for dtype in (torch.float64, tensors[0].dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        outputs = definition(*leaves)
        made = [g.to(dtype) for g in grads]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, made)))
    for i, (ours, exact, eager) in enumerate(zip(found, *results, strict=True)):
        assert ours.shape == exact.shape, i
        allowed = 2 * rms(eager - exact) + floor * max(1.0, rms(exact))
        assert rms(ours - exact) <= allowed, f"{i}: {rms(ours - exact):.1e} > {allowed:.1e}"


FLOORS = {torch.float32: 2e-7, torch.float16: 2e-5}


# The gate


def gate_definition(mask):
    def definition(pair):
        u, g = pair.chunk(2, -1)
        return (F.gelu(u) * g * mask.to(pair.dtype).view(g.shape),)

    return definition


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "width", "p"),
    [
        (17, 96, 0.0),
        (17, 200, 0.3),  # two blocks of columns, the second padded
        (5, 33, 0.6),
        (1, 1, 0.0),
        (0, 96, 0.3),
        (9, 1152, 0.1),
        (3, 130, 0.0),
    ],
)
def test_gated(dtype, n, width, p):
    pair, dy = normal(n, 2 * width, dtype=dtype, scale=2.0), normal(n, width, dtype=dtype)
    drop = {"p": p, "seed": seed() if p else None}
    y = gate.gated(pair, **drop)
    found = [y, gate.gated_backward(dy, pair, **drop)]
    assert y.dtype == found[1].dtype == dtype
    check(found, gate_definition(mask_of(n, width, p)), [pair], [dy], FLOORS[dtype])


def test_gated_rounds_once():
    """Eager rounds gelu(u) to half before it multiplies."""
    pair = normal(64, 256, dtype=torch.float16)
    u, g = pair.chunk(2, -1)
    exact = F.gelu(u.double()) * g.double()
    assert rms(gate.gated(pair) - exact) < 0.9 * rms(F.gelu(u) * g - exact)


def test_gated_fast_is_near_and_has_its_own_derivative():
    pair, dy = normal(4, 64), normal(4, 32)
    exact, fast = gate.gated(pair, "gelu"), gate.gated(pair, "gelu_fast")
    assert 0 < (exact - fast).abs().max() < 1e-3 * pair.abs().max()
    step = 1e-3 * normal(4, 64)
    ends = [gate.gated(pair + s * step, "gelu_fast") for s in (1, -1)]
    slope = ((ends[0] - ends[1]) / 2 * dy).double().sum().item()
    back = gate.gated_backward(dy, pair, "gelu_fast")
    assert (back * step).double().sum().item() == pytest.approx(slope, rel=2e-2)


def test_gated_of_no_activation_is_a_product():
    pair = normal(3, 20)
    u, g = pair.chunk(2, -1)
    torch.testing.assert_close(gate.gated(pair, None), u * g)


# The sum and its LayerNorm


def norm_definition(mask):
    def definition(x, residual, weight, *bias):
        total = residual + x * mask.to(x.dtype).view(x.shape)
        return total, F.layer_norm(total, total.shape[-1:], weight, *bias, eps=EPS)

    return definition


def norm_inputs(*size, bias=True, dtype=torch.float32):
    width = size[-1]
    weight = normal(width, dtype=dtype, scale=0.2) + 1.5
    rest = [normal(width, dtype=dtype)] if bias else []
    return [normal(*size, dtype=dtype), normal(*size, dtype=dtype), weight, *rest]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "width", "p", "bias"),
    [
        (17, 96, 0.0, False),
        (17, 96, 0.3, True),
        (5, 33, 0.0, True),
        (5, 33, 0.6, False),
        (1, 7, 0.0, False),
        (0, 96, 0.3, True),
        (3, 768, 0.1, False),
    ],
)
def test_add_norm(dtype, n, width, p, bias):
    tensors = norm_inputs(n, width, bias=bias, dtype=dtype)
    x, residual, weight, *rest = tensors
    shift = rest[0] if bias else None
    drop = {"p": p, "seed": seed() if p else None}
    out = norm.residual_norm(x, residual, weight, shift, EPS, **drop, keep=True, total=True)
    grads = [normal(n, width, dtype=dtype), normal(n, width, dtype=dtype)]
    back = norm.residual_norm_backward(
        grads[1], out.total, out.mean, out.rstd, weight, added=grads[0], **drop, has_bias=bias
    )
    found = [out.total, out.y, back.dx, back.dtotal, back.dweight]
    found += [back.dbias] if bias else []
    definition = norm_definition(mask_of(n, width, p))
    check(found, definition, tensors, grads, 10 * FLOORS[dtype])
    again = norm.residual_norm(x, residual, weight, shift, EPS, **drop, total=True)
    assert torch.equal(again.y, out.y)
    assert torch.equal(again.total, out.total)
    assert again.mean is None


# The ops


def leaves(tensors):
    return [t.detach().requires_grad_() for t in tensors]


def gate_call(p=0.0):
    def call(pair):
        return (gated(pair, p=p, seed=seed() if p else None),)

    return call, gate_definition(mask_of(6, 40, p)), leaves([normal(2, 3, 80)])


def norm_call(p=0.0, bias=True):
    def call(x, residual, weight, shift=None):
        return add_norm(x, residual, weight, shift, EPS, p=p, seed=seed() if p else None)

    return call, norm_definition(mask_of(6, 20, p)), leaves(norm_inputs(2, 3, 20, bias=bias))


CALLS = {
    "gated": gate_call,
    "gated dropout": lambda: gate_call(0.4),
    "add_norm": norm_call,
    "add_norm without bias": lambda: norm_call(bias=False),
    "add_norm dropout": lambda: norm_call(0.4),
}
every = pytest.mark.parametrize("name", CALLS)


@every
def test_op_is_its_definition(name):
    call, definition, tensors = CALLS[name]()
    outputs = call(*tensors)
    grads = [normal(*y.shape) for y in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, tensors, grads)]
    check(found, definition, tensors, grads, 2e-6)


@pytest.mark.parametrize("which", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradient_of_one_output(which, p):
    call, definition, tensors = norm_call(p)
    dy = normal(2, 3, 20)
    found, expected = (
        torch.autograd.grad(f(*tensors)[which], tensors, dy, allow_unused=True)
        for f in (call, definition)
    )
    for ours, exact in zip(found, expected, strict=True):
        exact = torch.zeros_like(ours) if exact is None else exact
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@every
def test_without_gradients_nothing_is_kept_and_nothing_changes(name):
    call, _, tensors = CALLS[name]()
    outputs = call(*tensors)
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        found = call(*tensors)
    for one, other in zip([*found, *tensors], [*outputs, *before], strict=True):
        assert torch.equal(one, other)
    if name.startswith("add_norm"):
        op = torch.ops.kronbert.add_norm
        x, residual, weight, *_ = (t.detach() for t in norm_inputs(3, 12))
        *_, mean, rstd = op(x, residual, weight, None, EPS, 0.0, None, False)
        assert mean.numel() == rstd.numel() == 0


@every
def test_op_takes_any_strides(name):
    call, _, tensors = CALLS[name]()
    outputs = call(*tensors)
    grads = [normal(*y.shape) for y in outputs]
    expected = torch.autograd.grad(outputs, tensors, grads)
    spread = [torch.stack([t.detach()] * 2, -1)[..., 0].requires_grad_() for t in tensors]
    assert not spread[0].is_contiguous()
    again = call(*spread)
    wide = [torch.stack([g] * 2, -1)[..., 0] for g in grads]
    for one, other in zip(
        [*again, *torch.autograd.grad(again, spread, wide)], [*outputs, *expected], strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["gated dropout", "add_norm", "add_norm dropout"])
def test_op_compiles_whole(name):
    call, _, tensors = CALLS[name]()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    outputs, again = call(*tensors), compiled(*tensors)
    grads = [normal(*y.shape) for y in outputs]
    for one, other in zip(
        [*outputs, *torch.autograd.grad(outputs, tensors, grads)],
        [*again, *torch.autograd.grad(again, tensors, grads)],
        strict=True,
    ):
        assert torch.equal(one, other)


def op_arguments(name, p, keep=True):
    """Arguments of ``kronbert::<name>`` as it is registered, with gradients."""
    drawn = seed() if p else None
    if name == "gated":
        return (*leaves([normal(3, 24)]), "gelu", p, drawn)
    return (*leaves(norm_inputs(3, 12)), EPS, p, drawn, keep)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["gated", "add_norm"])
def test_opcheck(name, p):
    torch.library.opcheck(getattr(torch.ops.kronbert, name).default, op_arguments(name, p))


def test_opcheck_of_what_is_not_kept():
    with torch.no_grad():
        for name in ("gated", "add_norm"):
            arguments = tuple(
                a.detach() if isinstance(a, torch.Tensor) else a
                for a in op_arguments(name, 0.0, False)
            )
            torch.library.opcheck(getattr(torch.ops.kronbert, name).default, arguments)


@pytest.mark.parametrize("name", ["gated", "add_norm"])
def test_second_derivative_is_refused(name):
    call, _, tensors = CALLS[name]()
    (dx,) = torch.autograd.grad(call(*tensors)[-1].pow(3).sum(), tensors[0], create_graph=True)
    with pytest.raises(KronbertError, match="no second derivative"):
        dx.sum().backward()


def test_gradient_of_what_was_not_kept_is_refused():
    with pytest.raises(KronbertError, match=r"add_norm: a gradient .* kronbert.blocks.add_norm"):
        torch.ops.kronbert.add_norm(*op_arguments("add_norm", 0.0, False))


def test_autocast_casts_the_gate_and_leaves_the_stream():
    """What runs through all layers keeps its dtype, as eager's sum does."""
    call, _, tensors = gate_call()
    with torch.autocast(DEVICE, dtype=torch.float16):
        (y,) = call(*tensors)
    assert y.dtype == torch.float16
    assert torch.autograd.grad(y.sum(), tensors)[0].dtype == torch.float32
    call, definition, (x, residual, *affine) = norm_call()
    half = x.detach().half().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.float16):
        total, normed = call(half, residual, *affine)
    expected = definition(half.float(), residual, *affine)
    assert total.dtype == normed.dtype == torch.float32
    assert torch.equal(total, expected[0])
    torch.testing.assert_close(normed, expected[1])
    (total + normed).sum().backward()
    assert half.grad.dtype == torch.float16
    assert residual.grad.dtype == torch.float32
    # Half and half, in no autocast: as they are.
    assert call(half, half, *affine)[0].dtype == torch.float16


def test_wrong_calls_are_named():
    with pytest.raises(ShapeError, match=r"gated: rows \(3, 7\): expected \(n, 2 \* width\)"):
        gated(normal(3, 7))
    with pytest.raises(ShapeError, match=r"gated: activation='relu': expected None, 'gelu'"):
        gated(normal(3, 8), activation="relu")
    with pytest.raises(ShapeError, match=r"pair is torch.float64: expected .* one of float32"):
        gated(normal(3, 8).double())
    with pytest.raises(KronbertError, match=r"gated: p=0.1 needs seed"):
        gated(normal(3, 8), p=0.1)
    with pytest.raises(ShapeError, match=r"pair \(4, 8\) is not contiguous: pass pair.contig"):
        gate.gated(normal(8, 4).mT)
    with pytest.raises(ShapeError, match=r"gated_backward: dy \(3, 8\): expected \(3, 4\)"):
        gate.gated_backward(normal(3, 8), normal(3, 8))
    x, weight = normal(3, 12), normal(12)
    with pytest.raises(ShapeError, match=r"residual \(2, 12\): expected \(3, 12\)"):
        add_norm(x, x[:2], weight, None, EPS)
    out = norm.residual_norm(x, x, weight, None, EPS, keep=True)
    kept = (x, out.total, out.mean, out.rstd, weight)
    with pytest.raises(ShapeError, match=r"residual_norm_backward: added \(2, 12\)"):
        norm.residual_norm_backward(*kept, added=x[:2])
    with pytest.raises(ShapeError, match=r"added is torch.float16: expected dy's torch.float32"):
        norm.residual_norm_backward(*kept, added=x.half())


# The blocks that use them


@pytest.fixture
def on_kernels(monkeypatch):
    """Blocks take the kernels' way on whatever device the tests have."""
    monkeypatch.setattr(cuda, "takes", lambda x: x.dtype in cuda.DTYPES)


def linear_of(out, inner, *, bias):
    b_out, b_in = 4, 3
    a, b = normal(2, out // b_out, inner // b_in, scale=0.3), normal(2, b_out, b_in, scale=0.3)
    return blocks.Linear([a], [b], normal(out) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_ffn_on_kernels(dtype, bias, on_kernels):
    x, dy = normal(2, 5, 12, dtype=dtype), normal(2, 5, 12, dtype=dtype)
    maps = [linear_of(72, 12, bias=bias), linear_of(12, 36, bias=bias)]
    tensors = [x, *(t.to(dtype) for m in maps for t in (m.a[0], m.b[0], m.bias) if t is not None)]

    def parts(x, *terms):
        half = len(terms) // 2
        for one in (terms[:half], terms[half:]):
            yield [one[0]], [one[1]], one[2] if bias else None

    def definition(x, *terms):
        linear = reference.kron_linear if x.dtype == torch.float64 else functional.kron_linear
        expand, contract = parts(x, *terms)
        u, g = linear(x, *expand).chunk(2, -1)
        return (linear(F.gelu(u) * g, *contract),)

    ours = leaves(tensors)
    y = blocks.gated_ffn(ours[0], *(blocks.Linear(*one) for one in parts(*ours)))
    found = [y, *torch.autograd.grad(y, ours, dy)]
    check(found, definition, tensors, [dy], 10 * FLOORS[dtype])


def test_blocks_pass_on_what_they_are_given(on_kernels, monkeypatch):
    seen = []

    def spy(pair, activation="gelu", *, p=0.0, seed=None):
        seen.append((activation, p, seed is not None))
        return pair.chunk(2, -1)[0].contiguous()

    monkeypatch.setattr(gate, "gated", spy)
    maps = linear_of(72, 12, bias=True), linear_of(12, 36, bias=True)
    halves = [blocks.Linear([m.a[0].half()], [m.b[0].half()], m.bias.half()) for m in maps]
    x = normal(3, 12)
    blocks.gated_ffn(x, *maps, gelu="fast")
    blocks.gated_ffn(x.half(), *halves, gelu="fast", dropout=0.2)
    assert seen == [("gelu", 0.0, False), ("gelu_fast", 0.2, True)]
    weight = torch.ones(12, device=DEVICE)
    kept = blocks.add_norm(
        torch.ones(400, 12, device=DEVICE),
        torch.zeros(400, 12, device=DEVICE),
        blocks.Norm(weight, None, EPS),
        dropout=0.25,
    )[0]
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((kept > 0).float().mean().item() - 0.75) < 0.03, "4,800 draws: 4.8 deviations"


def test_import_loads_no_triton():
    code = (
        "import sys; import kronbert.op_gated, kronbert.op_add_norm; "
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
