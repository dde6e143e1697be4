"""The ops of the linear kernels: autograd, `torch.compile`, autocast, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kronbert import cuda, op_linear, reference
from kronbert.errors import KronbertError
from kronbert.shapes import KroneckerShape

pytest.importorskip("triton", reason="Triton is published for Linux only")
from kronbert.kernels.linear import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def leaves(*specs):
    """x and lists of a, b and biases that want gradients; outputs are about 1."""
    a, b, bias = [], [], []
    for spec in specs:
        shape = KroneckerShape.parse(spec)
        scale = (shape.rank * shape.in_features) ** -0.25
        a.append(torch.randn(shape.rank, shape.a_out, shape.a_in, device=DEVICE) * scale)
        b.append(torch.randn(shape.rank, shape.b_out, shape.b_in, device=DEVICE) * scale)
        bias.append(torch.randn(shape.out_features, device=DEVICE))
    x = torch.randn(5, a[0].shape[2] * b[0].shape[2], device=DEVICE)
    for one in (x, *a, *b, *bias):
        one.requires_grad_()
    return x, a, b, bias


def test_opcheck_linear():
    x, a, b, bias = leaves("16x2*12x24", "3:192x1*1x48")
    op = torch.ops.kronbert.kron_linear.default
    torch.library.opcheck(op, (x, a, b, bias[0], "gelu"))
    torch.library.opcheck(op, (x.detach(), [a[0].detach()], b[:1], None, ""))


def test_opcheck_qkv():
    x, a, b, bias = leaves(*["24x6*2x16"] * 3)
    op = torch.ops.kronbert.kron_qkv.default
    torch.library.opcheck(op, (x, a, b, bias))
    torch.library.opcheck(op, (x, a, b, []))


def both(x, a, b, bias):
    """Both ops on one input, as one number; strided input and gradient."""
    q, k, v = op_linear.kron_qkv(x.T, a[1:], b[1:], bias[1:])
    y = op_linear.kron_linear(x.T.view(5, 1, -1), a[:1], b[:1], bias[0], "gelu")
    return (q * k * v).sum() + y.transpose(0, 2).square().sum()


def test_autograd_and_compile():
    x, a, b, bias = leaves("16x2*12x8", *["8x2*2x8"] * 3)
    x = x.detach().T.contiguous().requires_grad_()
    inputs = (x, *a, *b, *bias)
    plain = torch.autograd.grad(both(x, a, b, bias), inputs)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(x, a, b, bias), inputs)
    doubles = [one.detach().double().requires_grad_() for one in inputs]
    dx, da, db, dbias = doubles[0], doubles[1:5], doubles[5:9], doubles[9:]
    q, k, v = (reference.kron_linear(dx.T, da[i], db[i], dbias[i]) for i in (1, 2, 3))
    y = F.gelu(reference.kron_linear(dx.T, da[0], db[0], dbias[0]))
    exact = torch.autograd.grad((q * k * v).sum() + y.square().sum(), doubles)
    for one, two, three in zip(plain, again, exact, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one.double(), three, rtol=1e-4, atol=1e-4)


def test_only_what_wants_a_gradient_gets_one():
    x, a, b, bias = leaves("16x2*12x24", "3:192x1*1x48")
    y = op_linear.kron_linear(x.detach(), [a[0].detach(), a[1]], b, bias[0])
    y.sum().backward()
    assert a[0].grad is None
    assert all(one.grad is not None for one in (a[1], *b, bias[0]))
    with torch.no_grad():
        assert not op_linear.kron_linear(x, a, b).requires_grad


def test_second_derivative_is_refused():
    x, a, b, bias = leaves(*["24x6*2x16"] * 3)
    for y in (op_linear.kron_linear(x, a[:1], b[:1]), op_linear.kron_qkv(x, a, b, bias)[1]):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(KronbertError, match="no second derivative"):
            dx.sum().backward()


def test_autocast():
    """The dtype in force, here float16 on a CPU; gradients in the parameters' own."""
    x, a, b, bias = leaves(*["24x6*2x16"] * 3)
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = op_linear.kron_linear(x, a[:1], b[:1], bias[0])
        three = op_linear.kron_qkv(x, a, b, bias)
        assert [one.dtype for one in (y, *three)] == [torch.float16] * 4
        sum(one.float().sum() for one in (y, *three)).backward()
    assert a[0].grad.dtype == x.grad.dtype == torch.float32
    halves = [one.half() for one in (x, a[0], b[0], bias[0])]
    again = linear(
        halves[0].detach(), [halves[1].detach()], [halves[2].detach()], halves[3].detach()
    )
    assert torch.equal(y, again)


def test_import_needs_no_triton():
    code = "import sys, kronbert.op_linear; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_compiled_graph_asks_of_the_gpu(monkeypatch):
    """`torch.compile` traces the question at every call: no search for modules in it, which torch
    2.11 leaves to Python."""

    def searched(*args):
        raise AssertionError("a module was searched for")

    monkeypatch.setattr("importlib.util.find_spec", searched)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda._supported.cache_clear()
    try:
        assert cuda._supported(0)
        cuda._supported.cache_clear()
        monkeypatch.setattr(torch.version, "hip", "6.4")  # compute capability 9.x too
        assert not cuda._supported(0)
    finally:
        cuda._supported.cache_clear()
