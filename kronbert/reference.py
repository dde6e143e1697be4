"""The definitions, dense and slow, in any dtype: what every fast path is compared with.

``a`` and ``b`` are one group's matrices, a (rank, a_out, a_in) and b (rank, b_out, b_in), or
sequences of them for a sum of groups of different shapes. ``starts``: the row on which each group's
first one is added, where a table's later groups make blocks of rows only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

Terms = Tensor | Sequence[Tensor]


def kron_weight(a: Terms, b: Terms, starts: Sequence[int] | None = None) -> Tensor:
    """``sum_r a[r] ⊗ b[r]``, summed over groups: (a_out * b_out, a_in * b_in)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        blocks = einsum(a, b, "r ao ai, r bo bi -> ao bo ai bi")
        return rearrange(blocks, "ao bo ai bi -> (ao bo) (ai bi)")
    weights = [kron_weight(one_a, one_b) for one_a, one_b in zip(a, b, strict=True)]
    if starts is not None:
        rows = weights[0].shape[0]
        weights = [
            torch.nn.functional.pad(weight, (0, 0, start, rows - start - weight.shape[0]))
            for weight, start in zip(weights, starts, strict=True)
        ]
    return torch.stack(weights).sum(0)


def kron_linear(x: Tensor, a: Terms, b: Terms, bias: Tensor | None = None) -> Tensor:
    """``x · Wᵀ + bias`` with W = `kron_weight`: x (..., a_in * b_in) -> (..., a_out * b_out)."""
    y = x @ kron_weight(a, b).mT
    return y if bias is None else y + bias


def kron_embedding(ids: Tensor, a: Terms, b: Terms, starts: Sequence[int] | None = None) -> Tensor:
    """Rows ``ids`` of `kron_weight`: ids (...) -> (..., a_in * b_in)."""
    return kron_weight(a, b, starts)[ids]


def kron_logits(
    h: Tensor,
    a: Terms,
    b: Terms,
    bias: Tensor | None = None,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """Scores of every row of a Kronecker table: h (..., width) -> (..., rows)."""
    y = h @ kron_weight(a, b, starts).mT
    return y if bias is None else y + bias
