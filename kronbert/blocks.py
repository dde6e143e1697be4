"""The fused forms of an encoder layer: linear maps with what follows them, in one call.

Each is the plain composition its docstring names, whatever engine runs it: plain PyTorch here, the
chunked CPU engine, or a Triton kernel. `kronbert.fusion` puts them under a model's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import cpu, cpu_blocks, cpu_train, cuda, functional
from .errors import ShapeError
from .forms import CHUNK_BYTES

Gelu = Literal["exact", "fast"]
"""exact: erf. fast: a form for half precision, within 1e-3 of erf; only kernels use it."""


class Linear(NamedTuple):
    """A Kronecker linear map: groups a (rank, a_out, a_in), b (rank, b_out, b_in), bias (out)."""

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    bias: Tensor | None


class Norm(NamedTuple):
    """A LayerNorm over the last dimension: weight (width) and bias (width) or None, eps."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class Lookup(NamedTuple):
    """Rows ``ids`` of a dense table (entries, width); padding_idx gets no gradient."""

    ids: Tensor
    table: Tensor
    padding_idx: int | None = None

    def rows(self) -> Tensor:
        return F.embedding(self.ids, self.table, self.padding_idx)


def residual_norm(
    x: Tensor, residual: Tensor | None, norm: Norm, *, dropout: float = 0.0
) -> Tensor:
    """``LN(residual + dropout(x))``; x, residual (..., width).

    dropout: the probability in this call, 0 in evaluation."""
    if cuda.takes(x):
        return cuda.residual_norm(x, residual, norm, dropout)
    made = None if dropout else cpu_blocks.residual_norm(x, residual, norm)
    if made is not None:
        return made
    x = F.dropout(x, dropout) if dropout else x
    x = x if residual is None else residual + x
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def add_norm(
    x: Tensor, residual: Tensor, norm: Norm, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``total = residual + dropout(x)`` and ``LN(total)``: x, residual, both out (..., width).

    What a layer that norms before its halves needs between them. total is in the wider dtype of x
    and residual, under autocast too."""
    if cuda.takes(x) and cuda.takes(residual):
        return cuda.add_norm(x, residual, norm, dropout)
    total = residual + (F.dropout(x, dropout) if dropout else x)
    return total, F.layer_norm(total, total.shape[-1:], norm.weight, norm.bias, norm.eps)


def qkv(x: Tensor, query: Linear, key: Linear, value: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """The three maps of one input: x (..., in) -> three of (..., out)."""
    if cuda.takes(x):
        found = [functional.checked("qkv", x, *linear) for linear in (query, key, value)]
        if all(len(groups) == 1 for _, groups, _, _ in found):
            pairs = [groups[0] for _, groups, _, _ in found]
            made = cuda.qkv(found[0][0], pairs, [bias for *_, bias in found])
            if made is not None:
                return made
    q, k, v = (functional.kron_linear(x, *linear) for linear in (query, key, value))
    return q, k, v


def attention(
    x: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    heads: int,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor | None:
    """``softmax(scale q kᵀ + mask) v`` of x's three maps: x (batch, tokens, width) -> (batch,
    tokens, heads * head width). mask (batch or 1, 1, tokens or 1, tokens): True for a key that is
    seen, or numbers to add to the scores. None where no engine has it in one call."""
    made = cpu_blocks.attention(x, (query, key, value), heads, scale, mask)
    return cpu_train.attention(x, (query, key, value), heads, scale, mask) if made is None else made


def linear_norm(
    x: Tensor, linear: Linear, residual: Tensor, norm: Norm, *, dropout: float = 0.0
) -> Tensor:
    """``LN(residual + dropout(linear(x)))``: x (..., in), residual (..., out) -> (..., out)."""
    if cuda.takes(x):
        x, groups, _, bias = functional.checked("linear_norm", x, *linear)
        return cuda.linear_norm(x, groups, bias, residual, norm, dropout)
    made = None if dropout else cpu_blocks.linear_norm(x, linear, residual, norm)
    if made is not None:
        return made
    y = functional.kron_linear(x, *linear)
    if not dropout and cpu.in_place(y) and y.dtype == residual.dtype and y is not residual:
        return residual_norm(y.add_(residual), None, norm)
    return residual_norm(y, residual, norm, dropout=dropout)


def ffn(x: Tensor, expand: Linear, contract: Linear, *, gelu: Gelu = "exact") -> Tensor:
    """``contract(gelu(expand(x)))``: x (..., width) -> (..., width).

    On a CPU, eager, the backward pass makes the wide hidden layer anew instead of keeping it: a
    k21 student of BERT-base keeps x, 768 numbers a token, in place of 6,912."""
    if cuda.takes(x):
        x, groups, _, bias = functional.checked("ffn", x, *expand)
        return functional.kron_linear(cuda.expand_gelu(x, groups, bias, gelu), *contract)
    if cpu.in_place(x):
        made = cpu_blocks.ffn(x, expand, contract)
        if made is not None:
            return made
        return _in_chunks(x, expand, lambda part: _ffn_over(part, expand, contract))
    made = cpu_train.ffn(x, expand, contract)
    if made is not None:
        return made
    if cpu.takes(x, ()):
        return checkpoint(_ffn, x, expand, contract, use_reentrant=False, preserve_rng_state=False)
    return _ffn(x, expand, contract)


def _ffn(x: Tensor, expand: Linear, contract: Linear) -> Tensor:
    return functional.kron_linear(F.gelu(functional.kron_linear(x, *expand)), *contract)


def gated_ffn(
    x: Tensor,
    expand: Linear,
    contract: Linear,
    *,
    gelu: Gelu = "exact",
    dropout: float = 0.0,
) -> Tensor:
    """``contract(dropout(gelu(u) * g))``, u and g the halves of ``expand(x)``: x (..., width) ->
    (..., width). GeGLU (Shazeer 2020), as ModernBERT has it.

    Raises `ShapeError` unless expand gives twice what contract takes. On a CPU, eager, without
    dropout, the backward pass makes u and g anew instead of keeping them."""
    _require_halves(expand, contract)
    if cuda.takes(x):
        pair = functional.kron_linear(x, *expand)
        return functional.kron_linear(cuda.gated(pair, gelu, dropout), *contract)
    if cpu.in_place(x):
        return _in_chunks(x, expand, lambda part: _gated_ffn(part, expand, contract, dropout))
    if not dropout and cpu.takes(x, ()):
        return checkpoint(
            _gated_ffn, x, expand, contract, use_reentrant=False, preserve_rng_state=False
        )
    return _gated_ffn(x, expand, contract, dropout)


def _gated_ffn(x: Tensor, expand: Linear, contract: Linear, dropout: float = 0.0) -> Tensor:
    u, g = functional.kron_linear(x, *expand).chunk(2, -1)
    hidden = F.gelu(u)
    hidden = hidden.mul_(g) if cpu.in_place(hidden) else hidden * g
    return functional.kron_linear(F.dropout(hidden, dropout) if dropout else hidden, *contract)


def _require_halves(expand: Linear, contract: Linear) -> None:
    (_, a_out, _), (_, b_out, _) = expand.a[0].shape, expand.b[0].shape
    inner = contract.a[0].shape[2] * contract.b[0].shape[2]
    if a_out * b_out != 2 * inner:
        raise ShapeError(
            f"gated_ffn: expand gives {a_out * b_out}, contract takes {inner}: expected twice as "
            "much, what is activated and its gate. Check which layers they come from."
        )


def ffn_norm(
    x: Tensor,
    expand: Linear,
    contract: Linear,
    norm: Norm,
    *,
    gelu: Gelu = "exact",
    dropout: float = 0.0,
) -> Tensor:
    """``LN(x + dropout(contract(gelu(expand(x)))))``: the feed-forward half of a BERT layer."""
    if cuda.takes(x):
        rows, first, first_shapes, first_bias = functional.checked("ffn_norm", x, *expand)
        # contract's input is not made yet: an empty one of its size shows whether they fit.
        hidden = rows.new_empty(0, first_shapes[0].out_features)
        _, last, last_shapes, last_bias = functional.checked("ffn_norm", hidden, *contract)
        made = cuda.ffn_norm(
            rows,
            (first, first_shapes, first_bias),
            (last, last_shapes, last_bias),
            norm,
            gelu,
            dropout,
        )
        if made is not None:
            return made
    made = None if dropout else cpu_blocks.ffn_norm(x, expand, contract, norm)
    if made is not None:
        return made
    y = ffn(x, expand, contract, gelu=gelu)
    if not dropout and cpu.in_place(y) and y.dtype == x.dtype:
        return residual_norm(y.add_(x), None, norm)
    return residual_norm(y, x, norm, dropout=dropout)


def embed_norm(
    ids: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    norm: Norm | None,
    *,
    position: Lookup | None = None,
    kind: Lookup | None = None,
    padding_idx: int | None = None,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """``LN(word rows + type rows + position rows)``: ids (...) -> (..., width).

    a, b, starts: groups as `functional.kron_embedding` takes them; a dense table is a=[table],
    b=[]. position and kind (the token type) have ids that broadcast against ``ids``; norm None
    leaves the LayerNorm out."""
    if cuda.takes(a[0]) and ids.is_cuda:
        pairs = list(zip(a, b, strict=True)) if b else []
        made = cuda.embed_norm(ids, pairs, a[0], norm, position, kind, padding_idx)
        if made is not None:
            return made
    if b:
        x = functional.kron_embedding(ids, a, b, padding_idx, starts=starts)
    else:
        x = F.embedding(ids, a[0], padding_idx)
    for lookup in (kind, position):
        x = x if lookup is None else x + lookup.rows()
    if norm is None:
        return x
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _in_chunks(x: Tensor, expand: Linear, part: Callable[[Tensor], Tensor]) -> Tensor:
    """``part`` of x's rows, so many at a time that what ``expand`` makes of them stays small."""
    rows = x.reshape(-1, x.shape[-1])
    wide = expand.a[0].shape[1] * expand.b[0].shape[1]
    step = max(CHUNK_BYTES // (wide * x.element_size()), 1)
    parts = [part(chunk) for chunk in rows.split(step)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(*x.shape[:-1], y.shape[-1])


def _ffn_over(x: Tensor, expand: Linear, contract: Linear) -> Tensor:
    """`ffn` without gradients: the hidden layer is written over."""
    hidden = cpu_blocks.expand_gelu(x, expand)
    if hidden is None:
        hidden = torch.ops.aten.gelu_(functional.kron_linear(x, *expand))
    return functional.kron_linear(hidden, *contract)
