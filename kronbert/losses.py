"""The masked-word loss without a (tokens x vocabulary) matrix. Plain PyTorch, any device and dtype.

Its gradients are computed beside the value and alone kept for the backward pass: the teacher's
product over its vocabulary, the dearest of all, is not repeated. Sums are float32, or float64 where
that came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .errors import ShapeError
from .first_derivative import first_only

Terms = Tensor | Sequence[Tensor]

CHUNK_BYTES = 64 * 2**20
"""Of one float32 matrix of scores, chunk x vocabulary; about five of them live at a time."""

_REFUSAL = (
    "kronbert.losses: no second derivative: the gradients are computed beside the value. "
    "Write the loss with functional.kron_logits or the scores themselves to have one."
)


def mlm_loss(
    h: Tensor,
    a: Terms,
    b: Terms | None,
    bias: Tensor | None,
    labels: Tensor,
    *,
    starts: Sequence[int] | None = None,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(cross entropy of the labels, temperature² KL(teacher || student) or None): means over the
    rows whose label is not ``ignore_index``, 0 if there is none.

    h (..., width), labels (...). a (entries, rank, a_in) and b (rank, b_out, b_in), or sequences of
    groups, with starts, as `functional.kron_logits` takes them; or b None and a dense weight a
    (entries, width).
    teacher: (h (..., its width), weight (entries, its width), bias or None), without gradients. KL
    is of softmax(logits / temperature), Hinton et al. 2015. chunk: rows whose scores are held at a
    time, from `CHUNK_BYTES` if None. Reads the labels, so a GPU is waited for. Raises `ShapeError`
    for tensors that do not go together."""
    a = [a] if isinstance(a, Tensor) else list(a)
    b = [] if b is None else [b] if isinstance(b, Tensor) else list(b)
    entries = a[0].shape[0] * (b[0].shape[1] if b else 1)
    if h.dim() == 0 or labels.shape != h.shape[:-1]:
        raise ShapeError(
            f"mlm_loss: labels {tuple(labels.shape)}, h {tuple(h.shape)}: expected one label per "
            "row of h."
        )
    if not b and a[0].shape != (entries, h.shape[-1]):
        raise ShapeError(
            f"mlm_loss: weight {tuple(a[0].shape)} without b: expected (entries, {h.shape[-1]}). "
            "For a Kronecker table pass b too."
        )
    if starts is not None and not b:
        raise ShapeError(
            f"mlm_loss(starts={starts!r}) without b: a dense weight has no groups. Leave it out."
        )
    if not temperature > 0:
        raise ShapeError(f"mlm_loss(temperature={temperature!r}): expected a number > 0.")
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (4 * entries))
    if chunk < 1:
        raise ShapeError(f"mlm_loss(chunk={chunk!r}): expected at least one row, or None.")
    flat = labels.reshape(-1)
    rows = (flat != ignore_index).nonzero()[:, 0]
    kept = flat[rows]
    if kept.numel() and not 0 <= kept.min() <= kept.max() < entries:
        raise ShapeError(
            f"mlm_loss: labels from {int(kept.min())} to {int(kept.max())} with {entries} entries. "
            f"Rows without a label need ignore_index={ignore_index}."
        )
    if teacher is not None:
        _check_teacher(teacher, h, entries)
        teacher_h, weight, teacher_bias = teacher
        teacher_h = teacher_h.detach().reshape(-1, teacher_h.shape[-1])[rows]
        teacher = (teacher_h, weight.detach(), teacher_bias)
    settings = (len(a), starts, kept, teacher, temperature, chunk)
    h = h.reshape(-1, h.shape[-1])[rows]
    cross_entropy, kl = _MaskedWords.apply(settings, h, bias, *a, *b)
    return cross_entropy, kl if teacher is not None else None


def _check_teacher(teacher: tuple[Tensor, Tensor, Tensor | None], h: Tensor, entries: int) -> None:
    teacher_h, weight, _ = teacher
    if teacher_h.shape[:-1] != h.shape[:-1]:
        raise ShapeError(
            f"mlm_loss: teacher's h {tuple(teacher_h.shape)}, h {tuple(h.shape)}: expected as many "
            "rows. Give both models the same batch."
        )
    if weight.shape != (entries, teacher_h.shape[-1]):
        raise ShapeError(
            f"mlm_loss: teacher's weight {tuple(weight.shape)}: expected "
            f"{(entries, teacher_h.shape[-1])}. Both models need the same vocabulary."
        )


class _MaskedWords(torch.autograd.Function):
    """h (kept rows, width) -> both losses, and the gradients of each beside them."""

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], h: Tensor, bias: Tensor | None, *matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        groups, starts, labels, teacher, temperature, chunk = settings
        inputs = (h, bias, *matrices)
        needs = ctx.needs_input_grad[1:]
        exact = torch.float64 if h.dtype == torch.float64 else torch.float32
        values = h.new_zeros(2, dtype=exact)
        # Unscaled: divided by the number of rows they would vanish in float16.
        sums = [
            [
                x.new_zeros(x.shape, dtype=x.dtype if i == 0 else exact) if need else None
                for i, (x, need) in enumerate(zip(inputs, needs, strict=True))
                if x is not None
            ]
            for _ in range(1 if teacher is None else 2)
        ]
        # Of all chunks: autocast keeps what it casts, one copy for each leaf.
        shared = [
            x.detach().requires_grad_(need)
            for x, need in zip(inputs[1:], needs[1:], strict=True)
            if x is not None
        ]
        for start in range(0, h.shape[0], chunk):
            part = slice(start, start + chunk)
            leaves = [h[part].detach().requires_grad_(needs[0]), *shared]
            with torch.enable_grad():
                logits = _logits(leaves, bias is not None, groups, starts)
            taught = None
            if teacher is not None:
                taught = F.linear(teacher[0][part], *teacher[1:]).to(exact).div_(temperature)
            slopes = _chunk(logits.detach().to(exact), labels[part], taught, temperature, values)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            while wanted and slopes:
                total = sums[len(slopes) - 1]
                slope = slopes.pop().to(logits.dtype)
                grads = iter(torch.autograd.grad(logits, wanted, slope, retain_graph=bool(slopes)))
                for i, (leaf, kept) in enumerate(zip(leaves, total, strict=True)):
                    if leaf.requires_grad and kept is not None:
                        (kept[part] if i == 0 else kept).add_(next(grads))
        count = max(1, h.shape[0])
        ctx.count, ctx.present = count, [x is not None for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if x is not None), *(x for s in sums for x in s))
        cross_entropy, kl = (values / count).unbind(0)
        return cross_entropy.clone(), kl.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        number, tensors = sum(ctx.present), ctx.saved_tensors
        inputs, saved = tensors[:number], tensors[number:]
        grads = []
        for i, x in enumerate(inputs):
            parts = [
                total * (slope / ctx.count)
                for slope, total in zip(slopes, saved[i::number], strict=False)
                if total is not None
            ]
            grads.append(torch.stack(parts).sum(0).to(x.dtype) if parts else None)
        found = iter(first_only(grads, inputs, _REFUSAL))
        return None, *(next(found) if there else None for there in ctx.present)


def _logits(
    leaves: list[Tensor], biased: bool, groups: int, starts: Sequence[int] | None
) -> Tensor:
    h, *rest = leaves
    bias = rest.pop(0) if biased else None
    a, b = rest[:groups], rest[groups:]
    if not b:
        return F.linear(h, a[0], bias)
    return functional.kron_logits(h, a, b, bias, starts=starts)


def _chunk(
    scores: Tensor, labels: Tensor, taught: Tensor | None, temperature: float, values: Tensor
) -> list[Tensor]:
    """Add the chunk's sums to ``values``; gradients by its scores (rows, entries) of each loss.

    taught: the teacher's scores, divided by the temperature; overwritten."""
    found = []
    log_s = scores.log_softmax(-1)
    places = labels[:, None]
    values[0] -= log_s.gather(1, places).sum()
    found.append(log_s.exp().scatter_add_(1, places, -torch.ones_like(places, dtype=log_s.dtype)))
    if taught is not None:
        if temperature != 1:
            log_s = scores.div_(temperature).log_softmax(-1)
        log_t = taught.log_softmax(-1)
        p = log_t.exp()
        values[1] += log_t.sub_(log_s).mul_(p).sum() * temperature**2
        found.append(log_s.exp_().sub_(p).mul_(temperature))
    return found
