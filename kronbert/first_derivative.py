"""Gradients that were computed by hand, beside the value: differentiating them again is refused.

`torch.autograd.function.once_differentiable` refuses only what reaches every input: it hangs its
error on tensors cut off from them, so ``torch.autograd.grad`` by one input passes it by and gives a
second derivative that lacks a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import KronbertError


def first_only(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], refusal: str
) -> tuple[Tensor | None, ...]:
    """``grads``, computed from ``inputs`` without a graph; to differentiate them again raises
    `KronbertError` with the sentence ``refusal``."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    there = [grad for grad in grads if grad is not None]
    given = [tensor for tensor in inputs if tensor is not None]
    found = iter(_Refused.apply(refusal, len(there), *there, *given))
    return tuple(None if grad is None else next(found) for grad in grads)


class _Refused(torch.autograd.Function):
    """The identity on the first tensors; the others are what they were derived from."""

    @staticmethod
    def forward(ctx: Any, refusal: str, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.refusal = refusal
        return tuple(tensor.view_as(tensor) for tensor in tensors[:number])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise KronbertError(ctx.refusal)
