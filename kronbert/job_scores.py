"""The score of a saved model on a task, as `kronbert evaluate` prints it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .errors import DataError, PlanError
from .job_models import (
    check_tokenizer,
    classes_said,
    head_of,
    longest,
    open_pretrained,
    open_teacher,
    open_tokenizer,
)
from .job_rows import SAVED_LENGTH, open_data


@dataclass(frozen=True, kw_only=True)
class Scores:
    """scores: dev set -> metric -> fraction. what: task and files. max_length: tokens a row."""

    scores: dict[str, dict[str, float]]
    what: str
    max_length: int


def scores_of(model: str, task: str, *, max_length: int | None = None, **data: Any) -> Scores:
    """Of the fine-tuned model in a folder or on the hub; data: arguments of `job_rows.open_data`.

    max_length: None: what `compress` left in the tokenizer's settings, else the task's."""
    from transformers import AutoConfig

    from .distill.data import tokenize
    from .distill.finetune import evaluate

    rows = open_data(task, head=head_of(open_pretrained(AutoConfig, model)), **data)
    fine_tuned, tuned = open_teacher(model, rows.task)
    if not tuned:
        raise PlanError(
            f"{model}: has no head fine-tuned for a task, so there is no score. Fine-tune it, or "
            "give what `kronbert compress` wrote: OUTPUT/student."
        )
    tokenizer = open_tokenizer(model)
    check_tokenizer(fine_tuned, tokenizer, model)
    most = longest(fine_tuned.config, tokenizer)
    if max_length is not None and max_length > most:
        raise DataError(f"--max-length {max_length}: {model} takes {most} tokens at most.")
    saved = tokenizer.init_kwargs.get(SAVED_LENGTH)
    length = max_length
    if length is None:
        length = min(saved or rows.task.max_length, most)
    rows = replace(rows, train=rows.train.select(range(1)))  # not read
    return Scores(
        scores=evaluate(fine_tuned, tokenize(rows, tokenizer, length), tokenizer),
        what=f"{rows.task.name} ({rows.source}{classes_said(fine_tuned.config, rows.task)})",
        max_length=length,
    )
