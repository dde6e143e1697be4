"""Blocks on a CPU with gradients, in float32 and eager: what is wide exists a few rows at a time.

Of the feed-forward half, for two truncated SVDs: between their small sides, (n, rank) -> (n, rank),
lies all that is wide. Of attention: the scores of six queries, on the row kernels in C. What is
narrow is kept for the backward pass, which makes the rest anew. Forward and backward of a MiniLM
student 8 times smaller, one thread of an AMD EPYC (Zen 3): 1.16 times as fast on 128 rows of 13
tokens, 1.21 on 32 of 53, 1.27 on 32 of 128 as with PyTorch's GELU and attention by plain products.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, functional, native
from .cpu_blocks import HEAD, MASKS, TOKENS
from .errors import KronbertError
from .first_derivative import first_only
from .forms import LOW_RANK

if TYPE_CHECKING:
    from .blocks import Linear
    from .shapes import KroneckerShape

ROWS = 256
"""Rows of the hidden layer at a time. Rank 24, 384 -> 1,536 -> 384 on 1,696 rows, forward and
backward on one thread of an AMD EPYC (Zen 3), beside other work: whole 60.9 ms, 64 rows 39.7, 128
33.3, 256 31.7, 424 38.1."""


_REFUSAL = (
    "the fused layers have no second derivative: their kernels have a first one only. "
    "Differentiate twice on a model after kronbert.unfuse(model)."
)


def ffn(x: Tensor, expand: Linear, contract: Linear) -> Tensor | None:
    """``contract(gelu(expand(x)))``; None for what `middle` does not take, or what costs less with
    the weights multiplied out."""
    if len(expand.a) + len(contract.a) > 2 or torch.is_autocast_enabled("cpu"):
        return None
    pairs = (expand.a[0], expand.b[0]), (contract.a[0], contract.b[0])
    tensors = [x, *pairs[0], *pairs[1], *(b for b in (expand.bias, contract.bias) if b is not None)]
    if any(tensor.dtype != torch.float32 for tensor in tensors) or not cpu.takes(x, pairs):
        return None
    shapes = [functional.shape_of(*pair) for pair in pairs]
    rows = x.reshape(-1, x.shape[-1])
    if shapes[0].out_features != shapes[1].in_features or x.shape[-1] != shapes[0].in_features:
        return None  # for the plain call to refuse
    if not _low_rank(shapes, rows):
        return None
    (a, b), (last, down) = pairs
    z = middle(F.linear(rows, b[:, 0]), a[:, :, 0], expand.bias, down[:, 0])
    y = F.linear(z, last[:, :, 0].T, contract.bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _low_rank(shapes: Iterable[KroneckerShape], rows: Tensor) -> bool:
    """Whether each of these maps of ``rows`` costs least by its small side."""
    return all(
        cpu.choose((shape,), rows.dtype, len(rows), fresh=True) == (LOW_RANK,) for shape in shapes
    )


def middle(z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor) -> Tensor:
    """``gelu(z · up + bias) · downᵀ``: z (n, rank), up (rank, wide), bias (wide), down (rank of the
    other, wide) -> (n, rank of the other). First derivatives only."""
    found: Tensor = _Middle.apply(z, up, bias, down)
    return found


class _Middle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor) -> Tensor:
        y, hidden = z.new_empty(len(z), len(down)), z.new_empty(min(ROWS, len(z)), up.shape[1])
        own = _has_kernels(z, up)
        for start in range(0, len(z), ROWS):
            part = slice(start, start + ROWS)
            wide = _hidden(z[part], up, bias, hidden)
            if own:
                native.bias_gelu_(wide, None)
            else:
                torch.ops.aten.gelu_(wide)
            torch.mm(wide, down.T, out=y[part])
        ctx.save_for_backward(z, up, bias, down)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _check_plain(dy)
        saved = ctx.saved_tensors  # read once: a checkpointed layer has them once
        return first_only(_middle_backward(dy, *saved), (dy, *saved), _REFUSAL)


@torch.no_grad()
def _middle_backward(
    dy: Tensor, z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor
) -> tuple[Tensor | None, ...]:
    dz, dup, ddown = (torch.zeros_like(tensor) for tensor in (z, up, down))
    dbias = None if bias is None else torch.zeros_like(bias)
    hidden, gradient = (z.new_empty(min(ROWS, len(z)), up.shape[1]) for _ in range(2))
    own = _has_kernels(z, up)
    for start in range(0, len(z), ROWS):
        part = slice(start, start + ROWS)
        wide = _hidden(z[part], up, bias, hidden)
        dwide = torch.mm(dy[part], down, out=gradient[: len(wide)])
        if own:
            native.gelu_slope_(wide, dwide)
        else:
            slope = torch.ops.aten.gelu_backward(dwide, wide)
            wide, dwide = F.gelu(wide), slope
        ddown.addmm_(dy[part].T, wide)
        dup.addmm_(z[part].T, dwide)
        torch.mm(dwide, up.T, out=dz[part])
        if dbias is not None:
            dbias += dwide.sum(0)
    return dz, dup, dbias, ddown


def _check_plain(gradient: Tensor) -> None:
    """Refuse the many gradients at once of ``vectorize=True`` and ``is_grads_batched=True``."""
    kinds = torch._C._functorch
    if kinds.is_batchedtensor(gradient) or kinds.is_legacy_batchedtensor(gradient):
        raise KronbertError(
            "the fused layers take one gradient at a time. For batched ones differentiate a model "
            "after kronbert.unfuse(model)."
        )


def _has_kernels(z: Tensor, up: Tensor) -> bool:
    fits = z.dtype == torch.float32 and up.shape[1] % native.LANES == 0
    return fits and native.library() is not None


def _hidden(z: Tensor, up: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``z · up + bias``, written into the first rows of ``out``."""
    into = out[: len(z)]
    if bias is None:
        return torch.mm(z, up, out=into)
    return torch.addmm(bias, z, up, out=into)


def attention(
    x: Tensor,
    maps: tuple[Linear, Linear, Linear],
    heads: int,
    scale: float,
    mask: Tensor | None,
) -> Tensor | None:
    """`kronbert.cpu_blocks.attention` with gradients; None for what the row kernels do not take."""
    pairs = [pair for linear in maps for pair in zip(linear.a, linear.b, strict=True)]
    if x.dim() != 3 or x.shape[1] > TOKENS or not x.numel() or x.dtype != torch.float32:
        return None
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not cpu.takes(x, pairs):
        return None
    outs = {linear.a[0].shape[1] * linear.b[0].shape[1] for linear in maps}
    head, rest = divmod(max(outs), heads)
    if len(outs) > 1 or rest or head > HEAD or head % native.LANES or native.library() is None:
        return None
    added = None
    if mask is not None:
        added = None if mask.requires_grad else MASKS.added(mask, *x.shape[:2])
        if added is None:
            return None
    query, key, value = _maps(x, maps)
    found: Tensor = _Attention.apply(query, key, value, added, heads, scale)
    return found


def _maps(x: Tensor, maps: tuple[Linear, Linear, Linear]) -> Iterable[Tensor]:
    """The three maps of x (..., in). Of truncated SVDs one product with x gives all three small
    sides, and one its gradient: on 1,664 rows, ranks 35, forward and backward of the three in 0.78
    of the time of one by one (ranks 12 on 1,696 rows 0.69, ranks 35 on 4,096 rows 0.67; one thread
    of an AMD EPYC (Zen 3) beside other work)."""
    pairs = [(linear.a[0], linear.b[0]) for linear in maps]
    rows = x.reshape(-1, x.shape[-1])
    single = all(len(linear.a) == 1 for linear in maps)
    if not (single and _low_rank([functional.shape_of(*pair) for pair in pairs], rows)):
        return [functional.kron_linear(x, *linear) for linear in maps]
    small = F.linear(rows, torch.cat([b[:, 0] for _, b in pairs]))
    parts = small.split([len(b) for _, b in pairs], dim=1)
    return [
        F.linear(part, a[:, :, 0].T, linear.bias).view(*x.shape[:-1], -1)
        for part, (a, _), linear in zip(parts, pairs, maps, strict=True)
    ]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        heads: int,
        scale: float,
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        ctx.save_for_backward(query, key, value, mask)
        ctx.heads, ctx.scale = heads, scale
        return native.attention(query, key, value, (None, None, None), mask, heads, scale)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        _check_plain(slope)
        query, key, value, mask = ctx.saved_tensors
        with torch.no_grad():
            found = native.attention_backward(
                query, key, value, mask, ctx.heads, ctx.scale, slope.contiguous()
            )
        return *first_only(found, (slope, query, key, value), _REFUSAL), None, None, None
