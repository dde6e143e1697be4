"""The rows of a job: the task's own, and those without a label that stage 2 reads beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .errors import DataError
from .job_settings import CompressSettings

SAMPLE = 64
"""Training rows that are changed once to see whether they can be."""

MOST_COPIES = 20
"""Of one training row with words replaced, as TinyBERT takes at most 30."""


def open_data(
    task: str,
    *,
    data_dir: str | None = None,
    text_columns: tuple[str, ...] | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Any:
    """The `kronbert.distill.data.TaskData` of a GLUE name or a folder of tables."""
    from .distill.data import load_folder, load_task

    if not text_columns and not label_column:
        return load_task(task, data_dir=data_dir, limit=limit, seed=seed)
    if data_dir is not None:
        raise DataError(
            "columns are for a folder of tables, --data-dir for GLUE's: give one of them, "
            "--task FOLDER --text-column NAME --label-column NAME, or --task sst2 --data-dir GLUE."
        )
    return load_folder(task, text=text_columns, label=label_column, limit=limit, seed=seed)


def copies_for(rows: int, augment_to: int) -> int:
    """Changed copies per row that make ``rows`` ``augment_to`` or more, at most `MOST_COPIES`."""
    return max(0, min(MOST_COPIES, -(-augment_to // rows) - 1))


def check_more_rows(
    data: Any, settings: CompressSettings, augment_to: int, tokenizer: Any, table: Tensor
) -> None:
    """Raise `DataError`, before anything is trained, if `more_rows` could not make its rows."""
    copies = settings.augment
    if copies is None:
        copies = copies_for(len(data.train), augment_to)
    head = data.train.select(range(min(SAMPLE, len(data.train))))
    once = replace(settings, augment=min(copies, 1))
    try:
        more_rows(replace(data, train=head), once, 0, tokenizer, table, text_rows=1)
    except DataError as error:
        if settings.augment is not None or not copies:
            raise
        raise DataError(f"{error} Or leave the rows as they are: --augment 0.") from error


def more_rows(
    data: Any,
    settings: CompressSettings,
    augment_to: int,
    tokenizer: Any,
    table: Tensor,
    *,
    text_rows: int | None = None,
) -> Any:
    """``data`` with the rows without a label that the settings ask for; itself if there are none.

    augment_to: how many rows the recipe wants, unless settings.augment says how many copies. table:
    the teacher's word embeddings (entries, width), whose neighbours replace words. text_rows: of
    settings.unlabelled, at most."""
    from .distill.augmentation import augment
    from .distill.unlabelled import unlabelled_text, with_unlabelled

    extra = []
    copies = settings.augment
    if copies is None:
        copies = copies_for(len(data.train), augment_to)
    if copies > 0:
        extra.append(augment(data, tokenizer, table, copies=copies, seed=settings.seed))
    if settings.unlabelled is not None:
        extra.append(unlabelled_text(data.task, settings.unlabelled, limit=text_rows))
    return with_unlabelled(data, *extra)
