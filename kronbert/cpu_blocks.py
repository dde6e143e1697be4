"""The fused forms of `kronbert.blocks` on a CPU without gradients, on the row kernels in C.

Each returns None for what the kernels do not take (no compiler, gradients, autocast, compiling,
other dtypes, widths that are no multiple of 16): the caller composes it of plain calls then.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, functional, native
from .forms import Form, packed, plain_product, prepare
from .shapes import KroneckerShape

if TYPE_CHECKING:
    from .blocks import Linear, Norm

SLICES = 8
"""Slices of a row that `native.ffn_middle` holds in registers, on either side of the GELU."""

HEAD, TOKENS = 128, 512
"""Widest head and longest sequence of `attention`. PyTorch's takes 1.55 times as long at 128 tokens
and 1.2 times at 512 (float32, 12 heads of 64, 2-core Xeon, torch 2.13)."""

HALF_TOKENS = 32
"""The same in bfloat16, where PyTorch's runs on the processor's matrix tiles: 0.104 ms to 0.069 for
8 sequences of 16 tokens, but 0.148 to 0.224 for one of 128."""

WIDEST = 16384
"""Numbers of a row that `residual_norm` keeps on a thread's stack: 64 KiB."""

EXPAND, CONTRACT = Form("b", "rows", "mix"), Form("a", "mix", "rows")


def residual_norm(
    x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None = None
) -> Tensor | None:
    """``LN(x + bias + residual)``: x, residual (..., width)."""
    if x.shape[-1] > WIDEST or not _takes(x, residual, bias, norm.weight, norm.bias):
        return None
    if not _fit(x.shape[-1], norm.weight, norm.bias, bias):
        return None
    if residual is not None and residual.shape != x.shape:
        return None
    return native.add_norm(x, bias, residual, norm.weight, norm.bias, norm.eps)


def linear_norm(x: Tensor, linear: Linear, residual: Tensor, norm: Norm) -> Tensor | None:
    """``LN(residual + linear(x))``."""
    if not _takes(x, residual, linear.bias) or not _fit(_out(linear), linear.bias):
        return None
    y = functional.kron_linear(x, linear.a, linear.b)
    made = residual_norm(y, residual, norm, linear.bias)
    if made is None:
        y = y if linear.bias is None else y.add_(linear.bias)
        y = y.add_(residual)
        return F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps)
    return made


def ffn_norm(x: Tensor, expand: Linear, contract: Linear, norm: Norm) -> Tensor | None:
    """``LN(x + contract(gelu(expand(x))))``."""
    y = ffn(x, expand, contract._replace(bias=None))
    return None if y is None else residual_norm(y, x, norm, contract.bias)


def ffn(x: Tensor, expand: Linear, contract: Linear) -> Tensor | None:
    """``contract(gelu(expand(x)))`` of two maps that cut the hidden layer into the same slices, as
    the papers' presets do: x (..., width). The hidden layer is never in memory."""
    if not _takes(x, expand.bias, contract.bias) or len(expand.a) + len(contract.a) > 2:
        return None
    pairs = [(expand.a[0], expand.b[0]), (contract.a[0], contract.b[0])]
    for tensor in (*pairs[0], *pairs[1]):
        if tensor.is_inference() or tensor.dtype != x.dtype or not _readable(tensor):
            return None
    n = x.numel() // x.shape[-1]
    found = cpu.kept(("ffn", id(pairs[0][0])), pairs, None, x.shape[-1])
    joined = found.run(cpu.layout(x.dtype, n), lambda: _joined(pairs, n))
    if joined is None or x.shape[-1] != joined.inner:
        return None
    if not _fit(_out(expand), expand.bias) or not _fit(_out(contract), contract.bias):
        return None
    return joined.run(x, expand.bias, contract.bias)


def expand_gelu(x: Tensor, expand: Linear) -> Tensor | None:
    """``gelu(expand(x))``, bias and GELU written over the product."""
    bias = expand.bias
    if not _fit(_out(expand), bias) or (bias is not None and bias.dtype != x.dtype):
        return None
    y = functional.kron_linear(x, expand.a, expand.b)
    if _takes(y, bias):
        native.bias_gelu_(y.view(-1, y.shape[-1]), bias)
        return y
    return torch.ops.aten.gelu_(y if bias is None else y.add_(bias))


def attention(
    x: Tensor,
    maps: tuple[Linear, Linear, Linear],
    heads: int,
    scale: float,
    mask: Tensor | None,
) -> Tensor | None:
    """``softmax(scale q kᵀ + mask) v`` of x's query, key and value: x (batch, tokens, width) ->
    (batch, tokens, width). mask (batch or 1, 1, tokens or 1, tokens): True for a key that is seen,
    or numbers to add to the scores."""
    if x.dim() != 3 or x.shape[1] > TOKENS:
        return None
    if x.dtype == torch.bfloat16 and x.shape[1] > HALF_TOKENS:
        return None
    if not _takes(x, *(linear.bias for linear in maps)):
        return None
    out = _out(maps[0])
    head, rest = divmod(out, heads)
    if rest or head > HEAD or head % native.LANES:
        return None
    if any(_out(linear) != out or not _fit(out, linear.bias) for linear in maps):
        return None
    added = None
    if mask is not None:
        added = MASKS.added(mask, *x.shape[:2])
        if added is None:
            return None
    query, key, value = (functional.kron_linear(x, linear.a, linear.b) for linear in maps)
    biases = maps[0].bias, maps[1].bias, maps[2].bias
    return native.attention(query, key, value, biases, added, heads, scale)


class _Joined(NamedTuple):
    """Two maps ready to run. first and last are plain products; up and down, float32, lie between.

    k: slices of the input that meet ``first``; m: of what meets ``last``. inner: x's width."""

    first: Tensor
    up: Tensor
    down: Tensor
    last: Tensor
    k: int
    m: int
    inner: int

    def run(self, x: Tensor, bias: Tensor | None, last_bias: Tensor | None) -> Tensor:
        n = x.numel() // self.inner
        z = plain_product(x.view(n * self.k, -1), self.first)
        z = native.ffn_middle(z.view(n, self.up.shape[1], -1), self.up, bias, self.down)
        y = plain_product(z.view(n * self.m, -1), self.last).view(*x.shape[:-1], -1)
        return y if last_bias is None else y.add_(last_bias)


def _joined(pairs: list[tuple[Tensor, Tensor]], n: int) -> _Joined | None:
    """What `_Joined` needs for about n rows; None for maps that do not meet slice by slice."""
    expand, contract = (functional.shape_of(*pair) for pair in pairs)
    if not _meet(expand, contract):
        return None
    with torch.inference_mode(False), torch.no_grad():
        first, up = prepare(EXPAND, *pairs[0])
        down, last = prepare(CONTRACT, *pairs[1])
        # Cloned: a view would keep the parameter alive, and show changes half.
        first, last = packed(first.clone(), n * expand.a_in), packed(last.clone(), n)
        up, down = (m.to(torch.float32, copy=True).contiguous() for m in (up, down))
    return _Joined(first, up, down, last, expand.a_in, contract.a_out, expand.in_features)


def _meet(expand: KroneckerShape, contract: KroneckerShape) -> bool:
    return (
        (expand.a_out, expand.b_out) == (contract.a_in, contract.b_in)
        and expand.b_out % native.LANES == 0
        and expand.a_in * expand.rank <= SLICES
        and contract.a_out * contract.rank <= SLICES
    )


def _takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels read these: contiguous, one dtype, width a multiple of 16."""
    if (
        x.dtype not in native.DTYPES
        or not x.is_contiguous()
        or x.dim() < 2
        or x.shape[-1] % native.LANES
        or not x.numel()
        or not cpu.in_place(x)
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    for tensor in others:
        if tensor is not None and (
            tensor.dtype != x.dtype or not _readable(tensor) or not tensor.is_contiguous()
        ):
            return False
    return native.library() is not None


def _readable(tensor: Tensor) -> bool:
    """Whether its numbers lie in this process's memory."""
    return type(tensor) in cpu.PLAIN and tensor.is_cpu


def _fit(width: int, *vectors: Tensor | None) -> bool:
    """The kernels check no sizes: a wrong one is for the plain call to refuse."""
    for vector in vectors:
        if vector is not None and vector.shape != (width,):
            return False
    return True


def _out(linear: Linear) -> int:
    return linear.a[0].shape[1] * linear.b[0].shape[1]


class _Masks:
    """The last mask as numbers to add: every layer of a model is given the same one. Its values are
    compared: a buffer of NumPy's is written without torch's count of versions."""

    def __init__(self) -> None:
        # One tuple: threads that take turns see one mask's or another's, never half of each.
        self.last: tuple[weakref.ref[Tensor], tuple[int, int], Tensor, Tensor] | None = None

    def added(self, mask: Tensor, batch: int, tokens: int) -> Tensor | None:
        """(batch, 1 or tokens, tokens to a multiple of 16) float32; None for a mask of another
        form."""
        if mask.is_inference():
            return _added(mask, batch, tokens)
        last, of = self.last, (batch, tokens)
        if last is not None and last[0]() is mask and last[1] == of:
            if torch.equal(_narrow(mask), last[2]):
                return last[3]
        with torch.inference_mode(False), torch.no_grad():  # a training step may be next to read it
            made = _added(mask, batch, tokens)
            if made is not None:
                self.last = weakref.ref(mask), of, _narrow(mask).clone(), made
        return made


MASKS = _Masks()


def _narrow(mask: Tensor) -> Tensor:
    """One row of it where all queries share one."""
    return mask[:, :, :1] if mask.stride(2) == 0 else mask


def _added(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    if type(mask) is not Tensor or not mask.is_cpu or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, tokens):
        return None
    if mask.shape[3] != tokens:
        return None
    mask = _narrow(mask)
    if mask.dtype == torch.bool:
        seen = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        mask = seen.masked_fill_(~mask, -torch.inf)
    elif mask.dtype != torch.float32:
        return None
    mask = mask[:, 0].expand(batch, -1, -1)
    return F.pad(mask, (0, -tokens % native.LANES)).contiguous()
