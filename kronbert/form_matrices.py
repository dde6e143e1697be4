"""The names of forms, and the matrix that each stage of one multiplies with.

`kronbert.forms` says what the stages do. ``a`` (rank, a_out, a_in), ``b`` (rank, b_out, b_in); a
stage's matrix is (out, in), as `F.linear` takes it. All are differentiable; some are views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Stage = Callable[[Tensor, Tensor], Tensor]


class Form(NamedTuple):
    """order: which matrix meets the input first, "" for the dense form; then the form of its stage
    and that of the other's."""

    order: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.order}:{self.first}+{self.second}" if self.order else "dense"


def _rows_b(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, first: (rank b_out, b_in), on rows of a_in slices."""
    return b.reshape(-1, b.shape[2])


def _fold_b(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, first, as one matrix: (b_out a_in rank, a_in b_in)."""
    rank, b_out, b_in = b.shape
    a_in = a.shape[2]
    eye = torch.eye(a_in, dtype=b.dtype, device=b.device)
    folded = b.permute(1, 0, 2)[:, None, :, None, :] * eye[None, :, None, :, None]
    return folded.reshape(b_out * a_in * rank, a_in * b_in)


def _mix_a(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, second: (a_out, a_in rank)."""
    return a.permute(1, 2, 0).reshape(a.shape[1], -1)


def _fold_a(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, second, as one matrix: (a_out b_out, a_in rank b_out)."""
    rank, a_out, a_in = a.shape
    b_out = b.shape[1]
    eye = torch.eye(b_out, dtype=a.dtype, device=a.device)
    folded = a.permute(1, 2, 0)[:, None, :, :, None] * eye[None, :, None, None, :]
    return folded.reshape(a_out * b_out, a_in * rank * b_out)


def _fold_a_turned(a: Tensor, b: Tensor) -> Tensor:
    """The same for the order in which a folded b leaves its output: (..., b_out a_in rank)."""
    rank, a_out, a_in = a.shape
    b_out = b.shape[1]
    eye = torch.eye(b_out, dtype=a.dtype, device=a.device)
    folded = a.permute(1, 2, 0)[:, None, None, :, :] * eye[None, :, :, None, None]
    return folded.reshape(a_out * b_out, b_out * a_in * rank)


def _mix_a_first(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, first: (a_out rank, a_in)."""
    return a.permute(1, 0, 2).reshape(-1, a.shape[2])


def _fold_a_first(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, first, as one matrix: (a_out rank b_in, a_in b_in)."""
    rank, a_out, a_in = a.shape
    b_in = b.shape[2]
    eye = torch.eye(b_in, dtype=a.dtype, device=a.device)
    folded = a.permute(1, 0, 2)[:, :, None, :, None] * eye[None, None, :, None, :]
    return folded.reshape(a_out * rank * b_in, a_in * b_in)


def _rows_b_second(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, second: (b_out, rank b_in), on rows of a_out slices."""
    return b.permute(1, 0, 2).reshape(b.shape[1], -1)


def _fold_b_second(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, second, as one matrix: (a_out b_out, b_in a_out rank)."""
    rank, b_out, b_in = b.shape
    a_out = a.shape[1]
    eye = torch.eye(a_out, dtype=b.dtype, device=b.device)
    folded = b.permute(1, 2, 0)[None, :, :, None, :] * eye[:, None, None, :, None]
    return folded.reshape(a_out * b_out, b_in * a_out * rank)


def _gather_b(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, first, for the kernel: (b_out rank, b_in)."""
    return b.permute(1, 0, 2).reshape(-1, b.shape[2])


def _rows_a(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, second: (a_out, rank a_in), on rows of b_out slices."""
    return a.permute(1, 0, 2).reshape(a.shape[1], -1)


def _fold_a_gathered(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, second, as one matrix: (a_out b_out, b_out rank a_in)."""
    rank, a_out, a_in = a.shape
    b_out = b.shape[1]
    eye = torch.eye(b_out, dtype=a.dtype, device=a.device)
    folded = a.permute(1, 0, 2)[:, None, None, :, :] * eye[None, :, :, None, None]
    return folded.reshape(a_out * b_out, b_out * rank * a_in)


STAGES: dict[Form, tuple[Stage, Stage]] = {
    Form("b", "rows", "mix"): (_rows_b, _mix_a),
    Form("b", "rows", "turn"): (_rows_b, _mix_a),
    Form("b", "rows", "fold"): (_rows_b, _fold_a),
    Form("b", "fold", "turn"): (_fold_b, _mix_a),
    Form("b", "fold", "fold"): (_fold_b, _fold_a_turned),
    Form("a", "mix", "rows"): (_mix_a_first, _rows_b_second),
    Form("a", "turn", "rows"): (_mix_a_first, _rows_b_second),
    Form("a", "fold", "rows"): (_fold_a_first, _rows_b_second),
    Form("a", "turn", "fold"): (_mix_a_first, _fold_b_second),
    Form("b", "gather", "spread"): (_gather_b, _rows_a),
    Form("b", "gather", "fold"): (_gather_b, _fold_a_gathered),
}
"""The makers of a form's two matrices, in the order in which they meet the input."""
