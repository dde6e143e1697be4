"""The fused layers' operands and definitions, and how near to float64 a kernel must come."""

import torch
import torch.nn.functional as F

from kronbert import functional, reference
from kronbert.kernels import norm
from kronbert.shapes import KroneckerShape
from tests.kernel_operands import DEVICE, EPS, affine, matrices, normal, rms


def mask_of(n, width, p, drawn):
    """What dropout multiplies each place by, read off ones."""
    ones = torch.ones(n, width, device=DEVICE)
    weight = torch.ones(width, device=DEVICE)
    out = norm.residual_norm(ones, None, weight, None, EPS, p=p, seed=drawn, keep=True)
    assert out.total is not None
    return out.total.double()


def check(found, definition, inputs, dy, names, linear=functional.kron_linear):
    """found: (y, *gradients of inputs) against ``definition(linear, *inputs)`` in float64; at most
    twice as far off as eager PyTorch in the inputs' dtype."""
    results = []
    for dtype, engine in ((torch.float64, reference.kron_linear), (inputs[0].dtype, linear)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = definition(engine, *leaves)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(dtype))))
    floor = {torch.float32: 2e-7, torch.float16: 2e-4}[inputs[0].dtype]
    for name, ours, exact, eager in zip(["y", *names], found, *results, strict=True):
        assert ours.shape == exact.shape, name
        allowed = 2 * rms(eager - exact) + floor * max(1.0, rms(exact))
        assert rms(ours - exact) <= allowed, f"{name}: {rms(ours - exact):.1e} > {allowed:.1e}"


def ffn_inputs(expand, contract, n, dtype):
    first, width = KroneckerShape.parse(expand), KroneckerShape.parse(contract).out_features
    (a1, b1), (a2, b2) = matrices(expand, dtype), matrices(contract, dtype)
    bias1, bias2 = normal(first.out_features, dtype=dtype), normal(width, dtype=dtype)
    return [normal(n, width, dtype=dtype), a1, b1, bias1, a2, b2, bias2, *affine(width, dtype)]


FFN_NAMES = ["dx", "da1", "db1", "dbias1", "da2", "db2", "dbias2", "dweight", "dbias"]


def ffn_definition(mask=1.0):
    def definition(linear, x, a1, b1, bias1, a2, b2, bias2, weight, bias):
        y = linear(F.gelu(linear(x, a1, b1, bias1)), a2, b2, bias2)
        y = x + y * (mask if isinstance(mask, float) else mask.to(x.dtype))
        return F.layer_norm(y, x.shape[1:], weight, bias, EPS)

    return definition
