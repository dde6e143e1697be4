"""The rows of a job: the task's own, and those without a label that stage 2 reads beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .errors import DataError
from .job_settings import CompressSettings

SAMPLE = 64
"""Training rows of which some others are made, to see whether that can be done."""

MEASURED = 1024
"""Training rows whose tokens are counted."""

MOST_SPLICES = 20
"""Per training row, at most."""


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


def splices_for(data: Any, tokenizer: Any, wanted: int, max_length: int | None = None) -> int:
    """How many rows the training set lacks to hold ``wanted`` tokens, at most `MOST_SPLICES` for
    each that it has. Its tokens are counted on `MEASURED` rows drawn at random."""
    from .distill.data import tokenize

    rows = len(data.train)
    if not wanted or not rows:
        return 0
    drawn = data.train.shuffle(seed=0).select(range(min(MEASURED, rows)))
    sample = replace(data, train=drawn, validation={}, unlabelled=None)
    lengths = [len(row) for row in tokenize(sample, tokenizer, max_length).train["input_ids"]]
    return max(0, min(MOST_SPLICES * rows, wanted * len(lengths) // sum(lengths) - rows))


def check_more_rows(
    data: Any, settings: CompressSettings, tokens_wanted: int, tokenizer: Any, table: Tensor
) -> None:
    """Raise `DataError`, before anything is trained, if `more_rows` could not make its rows."""
    head = replace(data, train=data.train.select(range(min(SAMPLE, len(data.train)))))
    spliced = min(_splices(data, settings, tokens_wanted, tokenizer), 1)
    once = replace(settings, splice=0, augment=min(settings.augment, 1))
    more_rows(head, once, 0, tokenizer, table, text_rows=1)
    try:
        more_rows(head, replace(once, splice=spliced, augment=0, unlabelled=None), 0, tokenizer,
                  table)  # fmt: skip
    except DataError as error:
        raise DataError(f"{error} Or leave the rows as they are: --splice 0.") from error


def more_rows(
    data: Any,
    settings: CompressSettings,
    tokens_wanted: int,
    tokenizer: Any,
    table: Tensor,
    *,
    text_rows: int | None = None,
) -> Any:
    """``data`` with the rows without a label that the settings ask for; itself if there are none.

    tokens_wanted: how many the recipe wants, unless settings.splice says how many rows to add.
    table: the teacher's word embeddings (entries, width), whose neighbours replace words.
    text_rows: of settings.unlabelled, at most."""
    from .distill.augmentation import augment
    from .distill.splicing import splice
    from .distill.unlabelled import unlabelled_text, with_unlabelled

    extra = []
    if spliced := _splices(data, settings, tokens_wanted, tokenizer):
        extra.append(splice(data, count=spliced, seed=settings.seed))
    if settings.augment:
        extra.append(augment(data, tokenizer, table, copies=settings.augment, seed=settings.seed))
    if settings.unlabelled is not None:
        extra.append(unlabelled_text(data.task, settings.unlabelled, limit=text_rows))
    return with_unlabelled(data, *extra)


def _splices(data: Any, settings: CompressSettings, wanted: int, tokenizer: Any) -> int:
    if settings.splice is not None:
        return settings.splice
    return splices_for(data, tokenizer, wanted, settings.max_length)
