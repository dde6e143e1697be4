"""The student that stage 2 starts from: fitted to the teacher on the task, or a shipped one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch

from .depth import spread_layers
from .job_models import check_finite
from .job_start import Start, student_from

FIT, MEASURED = 2048, 256
"""Training rows to which the student is fitted, and on which its hidden states are compared."""

ROWS = 64
"""Of one batch."""


def candidates(
    teacher: Any,
    start: Start | None,
    wanted: Mapping[str, Any],
    rows: Any,
    tokenizer: Any,
    *,
    fitted: bool,
    seed: int,
) -> dict[str, Any]:
    """What it is called -> the student, for ``teacher`` (with its head).

    ``start``'s, and, if ``fitted``, the teacher's layers: with factor= in ``wanted`` fitted to what
    they give on training rows, with preset= to their weights, as in KroneckerBERT."""
    from .conversion import convert

    found: dict[str, Any] = {}
    if fitted and wanted.get("preset") is not None:
        found["converted"] = convert(teacher, **wanted)
    elif fitted:
        batches = row_batches(rows, FIT, seed, tokenizer)
        found["fitted"] = convert(teacher, **wanted, init="data", calibration=batches)
    if start is not None:
        found[start.name] = student_from(start, teacher, **wanted)
        check_finite(found[start.name], start.name, "Use an intact student, or --student none.")
    return found


def row_batches(rows: Any, count: int, seed: int, tokenizer: Any) -> list[dict[str, Any]]:
    """``count`` tokenised rows, or all, drawn with ``seed``: padded batches without labels.

    Rows of like lengths go together, in batches of no order: whoever reads the first few has rows
    of all lengths."""
    from transformers import DataCollatorWithPadding

    drawn = rows.shuffle(seed=seed).select(range(min(count, len(rows))))
    drawn = drawn.remove_columns([name for name in ("labels",) if name in drawn.column_names])
    given = sorted(drawn, key=lambda row: len(row["input_ids"]))
    starts = list(range(0, len(given), ROWS))
    Random(seed).shuffle(starts)
    collate = DataCollatorWithPadding(tokenizer)
    return [dict(collate(given[start : start + ROWS])) for start in starts]


@torch.no_grad()
def hidden_error(student: Any, teacher: Any, batches: Sequence[Mapping[str, Any]]) -> float:
    """Mean squared difference of the hidden states (tokens, width), summed over the layers.

    Padding is left out. Both have the same width; of fewer layers each is compared with the one
    that it learns from."""
    total, tokens = 0.0, 0
    device = next(student.parameters()).device
    was_training = student.training
    student.eval()
    teacher.eval()
    try:
        for given in batches:
            batch = {name: value.to(device) for name, value in given.items()}
            mask = batch["attention_mask"].bool()
            states = [
                model(**batch, output_hidden_states=True).hidden_states[1:]
                for model in (student, teacher)
            ]
            places = spread_layers(*map(len, states))
            for mine, place in zip(states[0], places, strict=True):
                theirs = states[1][place - 1]
                gap = (mine.float() - theirs.float())[mask]
                total += float(gap.square().mean()) * len(gap)
            tokens += int(mask.sum())
    finally:
        student.train(was_training)
    return total / tokens
