"""The row kernels' definitions, and how near to float64 they must round."""

import math

import torch
import torch.nn.functional as F


def rms(error):
    return error.double().square().mean().sqrt().item()


def assert_rounds_no_worse(found, eager, exact):
    """At most twice eager's error; of few numbers, at most twice that of the best rounding."""
    assert found.dtype == eager.dtype
    assert found.shape == exact.shape
    best = 0.25 * torch.finfo(found.dtype).eps * rms(exact)
    limit = 2 * max(rms(eager - exact), best)
    assert rms(found - exact) <= limit, f"off by {rms(found - exact):.2e}, limit {limit:.2e}"


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


# Definitions, in the dtype of what they are given.


def mix(z, matrix, bias):
    y = torch.einsum("pq,nqw->npw", matrix, z).flatten(1)
    return y if bias is None else y + bias


def gather(x, b, rows):
    return torch.einsum("mi,nri->nmr", b, x.unflatten(1, (rows, -1)))


def spread(z, bias):
    y = z.transpose(1, 2).flatten(1)
    return y if bias is None else y + bias


def ffn_middle(z, up, bias, down):
    hidden = F.gelu(mix(z, up, bias)).unflatten(1, (up.shape[0], -1))
    return mix(hidden, down, None).unflatten(1, (down.shape[0], -1))


def bias_gelu(x, bias):
    return F.gelu(x if bias is None else x + bias)


def add_norm(x, bias, residual, weight, shift, eps):
    total = x if bias is None else x + bias
    total = total if residual is None else total + residual
    return F.layer_norm(total, x.shape[-1:], weight, shift, eps)


def attention(query, key, value, biases, mask, heads, scale):
    """mask (batch, 1 or tokens, tokens)."""
    maps = (query, key, value)
    maps = (x if bias is None else x + bias for x, bias in zip(maps, biases, strict=True))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in maps)
    mask = None if mask is None else mask[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).flatten(2)


def compare(ours, definition, dtype, sizes, *rest, small=()):
    """``ours`` against ``definition`` of float64 operands; ``small`` ones ours takes in float32.

    Few numbers are drawn many times: the error of one draw is chance."""
    results = []
    for _ in range(1 + 4000 // math.prod(next(iter(sizes.values())))):
        given = {k: None if size is None else normal(*size).to(dtype) for k, size in sizes.items()}
        before = {k: None if t is None else t.clone() for k, t in given.items()}
        taken = [t.float() if k in small and t is not None else t for k, t in given.items()]
        found = ours(*taken, *rest)
        for name, tensor in given.items():
            if tensor is not None:
                assert torch.equal(bits(tensor), bits(before[name])), f"{name} was written"
        exact = definition(*(None if t is None else t.double() for t in given.values()), *rest)
        results.append((found, definition(*given.values(), *rest), exact))
    assert_rounds_no_worse(*(torch.cat(parts) for parts in zip(*results, strict=True)))
    return given, found


def normal(*size):
    return torch.randn(size, dtype=torch.float64)
