"""Means and covariances of a layer's inputs and wanted outputs over the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Of rows x (rows, in): their number, mean (in,), and gram (in, in) = E (x - mean)(x - mean)ᵀ.

    float64 on the CPU, whatever the rows are."""

    rows: int
    mean: Tensor
    gram: Tensor


@dataclass(frozen=True)
class Moments:
    """Of pairs of rows x (rows, in) and y (rows, out): `Inputs` of x, y's mean (out,), cross
    (out, in) = E (y - mean)(x - mean)ᵀ, and variance = E ||y - mean||²."""

    inputs: Inputs
    mean: Tensor
    cross: Tensor
    variance: float

    def about_zero(self) -> tuple[Tensor, Tensor]:
        """(E x xᵀ, E y xᵀ): what a layer without a bias has to meet."""
        x = self.inputs
        return x.gram + torch.outer(x.mean, x.mean), self.cross + torch.outer(self.mean, x.mean)

    def finite(self) -> bool:
        parts = (self.inputs.mean, self.inputs.gram, self.mean, self.cross)
        return all(bool(torch.isfinite(part).all()) for part in parts)

    def output_error(self, weight: Tensor, bias: Tensor | None) -> float:
        """sqrt(E||y - weight x - bias||² / E||y - E y||²); the numerator alone when y is constant.

        weight (out, in) and bias (out,) in float64 on the CPU."""
        off = self.mean - weight @ self.inputs.mean - (0.0 if bias is None else bias)
        spread = ((weight @ self.inputs.gram - 2 * self.cross) * weight).sum().item()
        square = max(spread + self.variance, 0.0) + off.square().sum().item()
        return float((square / (self.variance or 1.0)) ** 0.5)

    def __add__(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        x, z = self.inputs, other.inputs
        rows = x.rows + z.rows
        first, second = x.rows / rows, z.rows / rows
        between = first * second
        dx, dy = z.mean - x.mean, other.mean - self.mean
        inputs = Inputs(
            rows,
            first * x.mean + second * z.mean,
            first * x.gram + second * z.gram + between * torch.outer(dx, dx),
        )
        return Moments(
            inputs,
            first * self.mean + second * other.mean,
            first * self.cross + second * other.cross + between * torch.outer(dy, dx),
            first * self.variance + second * other.variance + between * dy.square().sum().item(),
        )


def token_rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """``value`` (..., width) as rows (n, width), without those of padded positions.

    mask (batch, tokens), nonzero where a token counts: a value (batch, tokens, ..., width),
    (tokens, batch, ..., width) or (batch * tokens, width) loses the others; any other, as one row
    per sentence, keeps all."""
    leading = value.shape[:-1]
    rows = value.reshape(-1, value.shape[-1])
    if mask is None:
        return rows
    if leading[:2] == mask.mT.shape != mask.shape:  # XLNet's
        mask = mask.mT
    if leading[:2] == mask.shape:
        each = leading[2:].numel()
        return rows[mask.reshape(-1).bool().repeat_interleave(each)]
    if len(leading) == 1 and leading[0] == mask.numel():
        return rows[mask.reshape(-1).bool()]
    return rows


class TokenRows(Sequence[Tensor]):
    """`token_rows` of many values, made anew at every reading: copies of them all would take as
    much memory as the forward passes that hold the values."""

    def __init__(self, values: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
        self._values, self._masks = values, masks

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, place: Any) -> Any:
        return token_rows(self._values[place], self._masks[place])


def input_moments(parts: Sequence[Tensor]) -> Inputs:
    """Of the rows of all ``parts`` (n, in), which may lie on any device, in any float dtype."""
    rows = sum(part.shape[0] for part in parts)
    mean = _mean(parts, rows)
    gram = mean.new_zeros(mean.shape[0], mean.shape[0])
    for part in parts:
        centred = _centred(part, mean)
        # float32 products of centred rows, summed over the batches in float64.
        gram += (centred.T @ centred).double().cpu()
    return Inputs(rows, mean, gram / rows)


def pair_moments(inputs: Inputs, given: Sequence[Tensor], parts: Sequence[Tensor]) -> Moments:
    """Of pairs of rows: x (n, in) in ``given``, which are those of ``inputs``, and y (n, out)."""
    mean = _mean(parts, inputs.rows)
    cross = mean.new_zeros(mean.shape[0], inputs.mean.shape[0])
    variance = 0.0
    for x, y in zip(given, parts, strict=True):
        wanted = _centred(y, mean)
        cross += (wanted.T @ _centred(x, inputs.mean)).double().cpu()
        variance += wanted.square().sum(dtype=torch.float64).item()
    return Moments(inputs, mean, cross / inputs.rows, variance / inputs.rows)


def _mean(parts: Sequence[Tensor], rows: int) -> Tensor:
    nothing = torch.zeros((), device="cpu")
    return sum((part.sum(0, dtype=torch.float64).cpu() for part in parts), nothing) / rows


def _centred(part: Tensor, mean: Tensor) -> Tensor:
    wide = part if part.dtype == torch.float64 else part.float()
    return wide - mean.to(wide)
