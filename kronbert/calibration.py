"""The batches that an initialisation reads: which are taken, what their masks say, how many tokens
they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import PlanError

READ_AT_MOST = 65_536
"""Tokens after which no further batch is read: a loader of a whole data set would not fit."""

APART, TOGETHER = 64, 4096
"""More batches than ``APART`` are put together, those of one form, up to so many tokens."""


def calibration_batches(init: str, calibration: Iterable[Any] | None) -> list[Any] | None:
    """The batches to fit on, at most `READ_AT_MOST` tokens; None for init="weights".

    Raises `PlanError` for arguments that do not go together and batches that cannot be used."""
    if init not in ("weights", "data"):
        raise PlanError(f"convert(init={init!r}): expected 'weights' or 'data'.")
    if init == "weights":
        if calibration is not None:
            raise PlanError(
                "convert(calibration=...): init='weights' reads no text. Add init='data', or leave "
                "calibration out."
            )
        return None
    if calibration is None or isinstance(calibration, Mapping | Tensor | str):
        raise PlanError(
            f"convert(init='data', calibration={type(calibration).__name__}): expected an iterable "
            "of batches of model inputs, for example a DataLoader, or a list with one dict that "
            "a tokenizer gave (return_tensors='pt')."
        )
    batches: list[Any] = []
    tokens = 0
    for index, batch in enumerate(calibration):
        if not isinstance(batch, Mapping | Tensor):
            raise PlanError(
                f"convert(calibration=...): batch {index} is a {type(batch).__name__}: expected a "
                "dict of tensors, as a tokenizer gives, or one tensor."
            )
        if found := tokens_of(batch, index):
            batches.append(dict(batch) if isinstance(batch, Mapping) else batch)
            tokens += found
        if tokens >= READ_AT_MOST:
            break
    if not tokens:
        raise PlanError(
            "convert(calibration=...): no batch has a token that counts. Give a few hundred "
            "sentences, as tensors (the tokenizer's return_tensors='pt')."
        )
    return _joined(batches) if len(batches) > APART else batches


def _joined(batches: Sequence[Any]) -> list[Any]:
    """Batches of one form put together: every batch costs two threads (`kronbert.walk`), and
    single sentences are batches too."""
    forms: dict[Any, list[Any]] = {}
    joined: list[Any] = []
    for batch in batches:
        tensors = batch if isinstance(batch, Mapping) else {"": batch}
        plain = all(isinstance(x, Tensor) and x.dim() for x in tensors.values())
        if plain and len({len(x) for x in tensors.values()}) == 1:
            form = tuple((name, x.shape[1:], x.dtype, x.device) for name, x in tensors.items())
            forms.setdefault(form, []).append(batch)
        else:
            joined.append(batch)
    for alike in forms.values():
        most = max(1, TOGETHER // max(1, tokens_of(alike[0], 0)))
        joined += [_one(alike[i : i + most]) for i in range(0, len(alike), most)]
    return joined


def _one(batches: Sequence[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], Tensor):
        return torch.cat(list(batches))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}


def mask_of(batch: Any, index: int) -> Tensor | None:
    """A batch's attention mask (batch, tokens), of (batch, choices, tokens) with choices as rows;
    None where every position counts."""
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 3:
        mask = mask.flatten(0, 1)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise PlanError(
            f"convert(calibration=...): batch {index} has an attention_mask of {shape}: expected "
            "a tensor (batch, tokens), nonzero where a token counts. Give the tokenizer's own."
        )
    return mask


def tokens_of(batch: Any, index: int) -> int:
    """Positions that count: by the mask, else of the first tensor (its last size is the width of
    features when it holds floats)."""
    mask = mask_of(batch, index)
    if mask is not None:
        return int(mask.count_nonzero())
    values = [batch] if isinstance(batch, Tensor) else list(batch.values())
    for value in values:
        if isinstance(value, Tensor):
            wide = value.is_floating_point() and value.dim() > 1
            return value.shape[:-1].numel() if wide else value.numel()
    return 0


def check_sides(model: Any, batches: Sequence[Any]) -> None:
    """Raise `PlanError` for padding in the batches of an encoder-decoder: which of the two masks
    holds for what a layer reads cannot be told where both sides are equally long."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    for index, batch in enumerate(batches):
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = None if isinstance(batch, Tensor) else batch.get(name)
            if isinstance(mask, Tensor) and not mask.all():
                raise PlanError(
                    f"convert(calibration=...): batch {index} of an encoder-decoder is padded (its "
                    f"{name} has zeros). Give batches of sentences of one length, single ones for "
                    "instance, without padding."
                )
