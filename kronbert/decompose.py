"""The nearest sum of Kronecker products to a weight (Van Loan and Pitsianis 1993).

Cutting W (out, in) into a_out * a_in blocks of b_out x b_in and laying each block in a row gives R
(a_out a_in, b_out b_in); W = sum_r a[r] ⊗ b[r] becomes R = sum_r vec(a[r]) vec(b[r])ᵀ, so the best
terms are R's leading singular pairs. They come from the eigenvectors of the smaller of R Rᵀ and
Rᵀ R in float64: one side of R is at most 32 for the papers' shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .errors import ShapeError
from .reference import kron_weight
from .shapes import KroneckerShape, check_groups

SMALL_SIDE = 1024
"""Up to this size of the Gram matrix all eigenvectors are computed (960: 0.2 s); above, only the
leading ones by Lanczos iteration (1,536: 0.3 s instead of 1.2 s; one core of a 2-core Xeon)."""

SWEEPS = 12
"""Alternating passes over the groups of a mixed sum; each never increases the error."""

CHUNK = 4_000_000
"""Numbers widened to float64 at once (32 MB): the vocabulary matrix never exists in it."""


@torch.no_grad()
def nearest_kronecker(
    weight: Tensor, shapes: KroneckerShape | Sequence[KroneckerShape]
) -> tuple[list[Tensor], list[Tensor], float]:
    """(a, b, error) of the sum nearest to ``weight`` (out, in) in the Frobenius norm.

    a, b: one tensor per group, a (rank, a_out, a_in) and b (rank, b_out, b_in), in weight's dtype,
    equal norms in each term. error: ||W - sum a ⊗ b|| / ||W|| in [0, 1], before rounding to that
    dtype. One group: the optimum. Several: alternating fits from the best single group, each on
    what the others leave; they hold this one weight in float64, once per group and twice more.

    Raises `ShapeError` when a shape does not make the weight, or the weight is no finite matrix."""
    groups = [shapes] if isinstance(shapes, KroneckerShape) else list(shapes)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ShapeError(
            f"nearest_kronecker: a weight {tuple(weight.shape)} of {weight.dtype}: expected a "
            "float matrix (out, in). Reshape or dequantise it."
        )
    check_groups(groups, weight.shape[0], weight.shape[1], "nearest_kronecker")
    if not torch.isfinite(weight).all():
        raise ShapeError(
            "nearest_kronecker: the weight holds NaN or infinity, expected finite numbers. Use an "
            "intact checkpoint, or keep the layer dense."
        )
    if len(groups) == 1:
        a, b, error = _fit(weight, groups[0])
        pairs = [(a, b)]
    else:
        pairs, error = _alternate(weight.double(), groups)
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


def _alternate(
    weight: Tensor, shapes: Sequence[KroneckerShape]
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Pairs of every group, and the relative error, of a sum of groups of different shapes."""
    fits = [_fit(weight, shape) for shape in shapes]
    norm = weight.norm().item()
    first = min(range(len(shapes)), key=lambda i: fits[i][2])
    error = fits[first][2]
    pairs = [(a, b) for a, b, _ in fits]
    # Every group but the best starts empty, so the sum is never worse than that one alone.
    parts = [torch.zeros_like(weight) for _ in shapes]
    parts[first] = kron_weight(*pairs[first])
    rest = weight - parts[first]
    if norm == 0:
        return pairs, 0.0
    order = [i for i in range(len(shapes)) if i != first] + [first]
    for _ in range(SWEEPS):
        previous = error
        for i in order:
            rest += parts[i]
            a, b, _ = _fit(rest, shapes[i])
            pairs[i], parts[i] = (a, b), kron_weight(a, b)
            rest -= parts[i]
        error = rest.norm().item() / norm
        if previous - error < 1e-6:
            break
    return pairs, error


def _fit(weight: Tensor, shape: KroneckerShape) -> tuple[Tensor, Tensor, float]:
    """The leading pairs of one group in float64, and the relative error."""
    blocks = rearranged(weight, shape)
    wide = blocks.shape[0] < blocks.shape[1]
    tall = blocks.T if wide else blocks
    gram = tall.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for part in _chunks(tall):
        gram.addmm_(part.T, part)
    squared_norm = gram.diagonal().sum().item()
    short = _leading(gram, min(shape.rank, gram.shape[0]))
    # R v = sigma u, one column per term: its norm is the singular value.
    long = torch.cat([part @ short for part in _chunks(tall)])
    sigma = long.norm(dim=0)
    error = (max(squared_norm - sigma.square().sum().item(), 0.0) / (squared_norm or 1.0)) ** 0.5
    if error < 1e-5:
        # Below the rounding of the difference above: measure it.
        left = zip(_chunks(tall), long.split(_chunk_rows(tall)), strict=True)
        missed = sum((part - u @ short.T).square().sum().item() for part, u in left)
        error = (missed / (squared_norm or 1.0)) ** 0.5
    root = sigma.sqrt()
    # Of a term of size zero one side stays: were both zero, neither would ever have a gradient.
    kept = torch.where(root > 0, root, 1.0)
    long, short = long / kept, short * kept
    if shape.rank > sigma.shape[0]:
        spare = shape.rank - sigma.shape[0]
        long, short = (torch.nn.functional.pad(terms, (0, spare)) for terms in (long, short))
    a, b = (short, long) if wide else (long, short)
    a = rearrange(a, "(o i) r -> r o i", o=shape.a_out).contiguous()
    b = rearrange(b, "(o i) r -> r o i", o=shape.b_out).contiguous()
    return a, b, error


def _chunk_rows(tall: Tensor) -> int:
    return max(1, CHUNK // tall.shape[1])


def _chunks(tall: Tensor) -> Iterator[Tensor]:
    """``tall`` in float64, a few rows at a time."""
    for part in tall.split(_chunk_rows(tall)):
        yield part.double()


def _leading(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors of the ``count`` largest eigenvalues as columns, descending."""
    size = gram.shape[0]
    if size > SMALL_SIDE and count <= size // 8:
        from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

        start = np.random.default_rng(0).standard_normal(size)
        # Multiplied by torch: scipy's own threads beside torch's made it 10 times slower.
        product = LinearOperator(
            gram.shape,
            lambda v: (gram @ torch.from_numpy(v).to(gram.device)).cpu().numpy(),
            dtype=start.dtype,
        )
        try:
            _, columns = eigsh(product, k=count, which="LA", v0=start, tol=1e-12)
        except ArpackError:  # no convergence, a zero matrix: all of them, the same answer
            pass
        else:
            return torch.from_numpy(columns[:, ::-1].copy()).to(gram.device)
    return torch.linalg.eigh(gram)[1][:, -count:].flip(1)
