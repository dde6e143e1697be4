"""The nearest sum of Kronecker products to a weight (Van Loan and Pitsianis 1993).

Cutting W (out, in) into a_out * a_in blocks of b_out x b_in and laying each block in a row gives R
(a_out a_in, b_out b_in); W = sum_r a[r] ⊗ b[r] becomes R = sum_r vec(a[r]) vec(b[r])ᵀ, so the best
terms are R's leading singular pairs. They come from the eigenvectors of the smaller of R Rᵀ and
Rᵀ R in float64: one side of R is at most 32 for the papers' shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .errors import ShapeError
from .reference import kron_weight
from .shapes import KroneckerShape, check_groups

SMALL_SIDE = 256
"""Up to this size of the Gram matrix all eigenvectors are computed; above, only the leading ones
by Lanczos iteration (1,536: 0.2 s instead of 1.2 s on one core of a 2-core Xeon)."""

SWEEPS = 12
"""Alternating passes over the groups of a mixed sum; each never increases the error."""


def nearest_kronecker(
    weight: Tensor, shapes: KroneckerShape | Sequence[KroneckerShape]
) -> tuple[list[Tensor], list[Tensor], float]:
    """(a, b, error) of the sum nearest to ``weight`` (out, in) in the Frobenius norm.

    a, b: one tensor per group, a (rank, a_out, a_in) and b (rank, b_out, b_in), in weight's dtype,
    equal norms in each pair. error: ||W - sum a ⊗ b|| / ||W|| in [0, 1], before rounding to that
    dtype. One group: the optimum. Several: alternating fits, each group on what the others leave.

    Raises `ShapeError` when a shape does not make the weight, or the weight is not finite."""
    shapes = [shapes] if isinstance(shapes, KroneckerShape) else list(shapes)
    check_groups(shapes, weight.shape[0], weight.shape[1], "nearest_kronecker")
    if not torch.isfinite(weight).all():
        raise ShapeError(
            "nearest_kronecker: the weight holds NaN or infinity. Train it without, or keep the "
            "layer dense."
        )
    if len(shapes) == 1:
        a, b, error = _fit(weight, shapes[0])
        return [a.to(weight.dtype)], [b.to(weight.dtype)], error
    exact = weight.double()
    pairs = [(exact.new_zeros(0), exact.new_zeros(0))] * len(shapes)
    parts = [torch.zeros_like(exact) for _ in shapes]
    error = previous = 1.0
    for _ in range(SWEEPS):
        for i, shape in enumerate(shapes):
            rest = exact - sum(part for j, part in enumerate(parts) if j != i)
            a, b, _ = _fit(rest, shape)
            pairs[i] = (a, b)
            parts[i] = kron_weight(a, b)
        norm = exact.norm().item()
        error = (exact - sum(parts)).norm().item() / norm if norm else 0.0
        if previous - error < 1e-6:
            break
        previous = error
    return [a.to(weight.dtype) for a, _ in pairs], [b.to(weight.dtype) for _, b in pairs], error


def rearranged(weight: Tensor, shape: KroneckerShape) -> Tensor:
    """R (a_out a_in, b_out b_in) of ``weight``: row (i, j) is the block that a[i, j] multiplies."""
    return rearrange(
        weight,
        "(ao bo) (ai bi) -> (ao ai) (bo bi)",
        ao=shape.a_out,
        ai=shape.a_in,
        bo=shape.b_out,
        bi=shape.b_in,
    )


def _fit(weight: Tensor, shape: KroneckerShape) -> tuple[Tensor, Tensor, float]:
    """The leading pairs of one group in float64, and the relative error."""
    rows = rearranged(weight, shape)
    flip = rows.shape[0] > rows.shape[1]
    gram, squared_norm = _gram(rows, flip)
    count = min(shape.rank, gram.shape[0])
    values, vectors = _leading(gram, count)
    sigma = values.clamp_min(0).sqrt()
    # The other side of each singular pair, times sigma: R v = sigma u.
    other = _project(rows, vectors, flip)
    left, right = (other, vectors) if flip else (vectors, other)
    root = sigma.sqrt()
    # other carries sigma once; the norm is split evenly between a and b.
    safe = torch.where(root > 0, root, torch.ones_like(root))
    a, b = (left / safe, right * root) if flip else (left * root, right / safe)
    if shape.rank > count:
        a = torch.cat([a, a.new_zeros(a.shape[0], shape.rank - count)], 1)
        b = torch.cat([b, b.new_zeros(b.shape[0], shape.rank - count)], 1)
    a = rearrange(a, "(o i) r -> r o i", o=shape.a_out).contiguous()
    b = rearrange(b, "(o i) r -> r o i", o=shape.b_out).contiguous()
    if squared_norm == 0:
        return a, b, 0.0
    missed = 1 - values.clamp_min(0).sum().item() / squared_norm
    if missed < 1e-10:
        # Below the rounding of the sum above, measure it.
        error = (weight.double() - kron_weight(a, b)).norm().item() / squared_norm**0.5
    else:
        error = missed**0.5
    return a, b, error


ROWS = 4096
"""Rows widened to float64 at once: the vocabulary matrix never exists twice."""


def _gram(rows: Tensor, flip: bool) -> tuple[Tensor, float]:
    """Rᵀ R (flip) or R Rᵀ in float64, and ||R||²."""
    if flip:
        gram = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for part in rows.split(ROWS):
            wide = part.double()
            gram.addmm_(wide.T, wide)
    else:
        wide = rows.double()
        gram = wide @ wide.T
    return gram, gram.diagonal().sum().item()


def _project(rows: Tensor, vectors: Tensor, flip: bool) -> Tensor:
    """R v (flip) or Rᵀ u in float64."""
    if flip:
        return torch.cat([part.double() @ vectors for part in rows.split(ROWS)])
    return rows.double().T @ vectors


def _leading(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues, descending, and their vectors as columns."""
    size = gram.shape[0]
    if size <= SMALL_SIDE or count > size // 8:
        values, vectors = torch.linalg.eigh(gram)
        return values[-count:].flip(0), vectors[:, -count:].flip(1)
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(0).standard_normal(size)
    found, columns = eigsh(gram.cpu().numpy(), k=count, which="LA", v0=start, tol=1e-12)
    values = torch.from_numpy(found.copy()).flip(0).to(gram.device)
    return values, torch.from_numpy(columns.copy()).flip(1).to(gram.device)
