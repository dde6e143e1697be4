"""The ops of layers that norm before their halves: strides, gradients, compile, refusals."""

import subprocess
import sys

import pytest
import torch

from kronbert.errors import KronbertError, ShapeError
from kronbert.op_add_norm import add_norm
from kronbert.op_gated import gated

pytest.importorskip("triton", reason="Triton is published for Linux only")

from kronbert.kernels import gated as gate
from kronbert.kernels import norm
from tests.gated_checks import check, gate_definition, mask_of, norm_definition, norm_inputs
from tests.kernel_operands import DEVICE, EPS, leaves, normal, seed


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


def test_import_loads_no_triton():
    code = (
        "import sys; import kronbert.op_gated, kronbert.op_add_norm; "
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
