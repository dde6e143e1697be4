"""The fused forms of an encoder layer: linear maps with what follows them, in one call.

Each is the plain composition its docstring names, whatever engine runs it: plain PyTorch here, the
chunked CPU engine, or a Triton kernel. `kronbert.fusion` puts them under a model's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, functional
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
    """``LN(residual + dropout(x))``; x, residual (..., width). dropout: the probability now, 0 in
    evaluation."""
    x = F.dropout(x, dropout) if dropout else x
    x = x if residual is None else residual + x
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def qkv(x: Tensor, query: Linear, key: Linear, value: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """The three maps of one input: x (..., in) -> three of (..., out)."""
    q, k, v = (functional.kron_linear(x, *linear) for linear in (query, key, value))
    return q, k, v


def linear_norm(
    x: Tensor, linear: Linear, residual: Tensor, norm: Norm, *, dropout: float = 0.0
) -> Tensor:
    """``LN(residual + dropout(linear(x)))``: x (..., in), residual (..., out) -> (..., out)."""
    return residual_norm(functional.kron_linear(x, *linear), residual, norm, dropout=dropout)


def ffn(x: Tensor, expand: Linear, contract: Linear, *, gelu: Gelu = "exact") -> Tensor:
    """``contract(gelu(expand(x)))``: x (..., width) -> (..., width)."""
    if cpu.in_place(x):
        return _ffn_in_chunks(x, expand, contract)
    return functional.kron_linear(F.gelu(functional.kron_linear(x, *expand)), *contract)


def _ffn_in_chunks(x: Tensor, expand: Linear, contract: Linear) -> Tensor:
    """The same without gradients, so many rows at a time that the hidden stays small."""
    rows = x.reshape(-1, x.shape[-1])
    wide = expand.a[0].shape[1] * expand.b[0].shape[1]
    step = max(CHUNK_BYTES // (wide * x.element_size()), 1)
    parts = [
        functional.kron_linear(
            torch.ops.aten.gelu_(functional.kron_linear(part, *expand)), *contract
        )
        for part in rows.split(step)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(*x.shape[:-1], y.shape[-1])


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
    return residual_norm(ffn(x, expand, contract, gelu=gelu), x, norm, dropout=dropout)


def embed_norm(
    ids: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    norm: Norm | None,
    *,
    position: Lookup | None = None,
    kind: Lookup | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """``LN(word rows + type rows + position rows)``: ids (...) -> (..., width).

    a, b: groups as `functional.kron_embedding` takes them; a dense table is a=[table], b=[].
    position and kind (the token type) have ids that broadcast against ``ids``; norm None leaves
    the LayerNorm out."""
    if b:
        x = functional.kron_embedding(ids, a, b, padding_idx)
    else:
        x = F.embedding(ids, a[0], padding_idx)
    for lookup in (kind, position):
        x = x if lookup is None else x + lookup.rows()
    if norm is None:
        return x
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
