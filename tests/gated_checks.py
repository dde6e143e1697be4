"""The gate's and the sum's definitions, and how near to float64 their kernels must come."""

import torch
import torch.nn.functional as F

from kronbert.kernels import norm
from tests.kernel_operands import DEVICE, EPS, normal, rms, seed


def mask_of(n, width, p):
    """What the norm kernel's dropout multiplies each place by: one mask for all kernels."""
    if not p:
        return torch.ones(n, width, device=DEVICE)
    ones, weight = torch.ones(n, width, device=DEVICE), torch.ones(width, device=DEVICE)
    out = norm.residual_norm(ones, None, weight, None, EPS, p=p, seed=seed(), keep=True)
    assert out.total is not None
    return out.total


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
