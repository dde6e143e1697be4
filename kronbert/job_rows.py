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

MOST_SPLICES = 40
"""Per training row, at most."""

SAVED_LENGTH = "kronbert_max_length"
"""What a job's tokens of a row are called in the settings of the tokenizer that it saves."""


def open_data(
    task: str,
    *,
    data_dir: str | None = None,
    text_columns: tuple[str, ...] | None = None,
    label_column: str | None = None,
    regression: bool | None = None,
    head: tuple[bool, list[str] | None] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Any:
    """The `kronbert.distill.data.TaskData` of a GLUE name or a folder of tables.

    head: of the teacher that is to read a folder's rows (`job_models.head_of`): it says whether
    their labels are scores, unless ``regression`` does, and in which order the classes stand."""
    from .distill.data import is_folder, load_folder, load_task

    named = text_columns or label_column
    if named and data_dir is not None:
        raise DataError(
            "columns are for a folder of tables, --data-dir for GLUE's: give one of them, "
            "--task FOLDER --text-column NAME --label-column NAME, or --task sst2 --data-dir GLUE."
        )
    if named or (is_folder(task) and data_dir is None):
        scores, classes = head or (None, None)
        return load_folder(
            task,
            text=text_columns,
            label=label_column,
            regression=regression,
            numbers_are_scores=scores,
            classes=classes,
            limit=limit,
            seed=seed,
        )
    if regression is not None:
        raise DataError(
            f"--regression and --classes are for a folder of tables; GLUE says what {task!r} is. "
            "Leave them out."
        )
    return load_task(task, data_dir=data_dir, limit=limit, seed=seed)


def cut_rows(data: Any, tokenizer: Any, length: int, most: int) -> str | None:
    """What share of `MEASURED` training rows is longer than ``length`` tokens, and what a larger
    one, ``most`` at most, would do about it; None below one in a hundred."""
    texts = [_drawn(data)[name][:] for name in data.task.text]
    whole = tokenizer(*texts, truncation=False, verbose=False)["input_ids"]
    tokens = [len(row) for row in whole]

    def share(given: int) -> float:
        return 100 * sum(count > given for count in tokens) / len(tokens)

    if share(length) < 1:
        return None
    said = f"{share(length):.0f} % of the rows are longer than {length} tokens and are cut there"
    enough = [n for n in (256, 512) if length < n < most and share(n) < 5]
    if enough:
        return f"{said}; --max-length {enough[0]} cuts {share(enough[0]):.0f} %"
    if length >= most:
        return f"{said}, the most that the model takes"
    return f"{said}; --max-length {most} is the most that the model takes"


def tokens_in(data: Any, tokenizer: Any, max_length: int | None = None) -> int:
    """How many tokens the training rows have, estimated from `MEASURED` rows drawn at random."""
    lengths = _lengths(data, tokenizer, max_length)
    return sum(lengths) * len(data.train) // max(1, len(lengths))


def splices_for(data: Any, tokenizer: Any, wanted: int, max_length: int | None = None) -> int:
    """How many rows the training set lacks to hold ``wanted`` tokens, at most `MOST_SPLICES` for
    each that it has. Its tokens are counted as by `tokens_in`."""
    rows = len(data.train)
    if not wanted or not rows:
        return 0
    lengths = _lengths(data, tokenizer, max_length)
    return max(0, min(MOST_SPLICES * rows, wanted * len(lengths) // sum(lengths) - rows))


def _lengths(data: Any, tokenizer: Any, max_length: int | None) -> list[int]:
    """Tokens of `MEASURED` training rows."""
    from .distill.data import tokenize

    sample = replace(data, train=_drawn(data), validation={}, unlabelled=None)
    return [len(row) for row in tokenize(sample, tokenizer, max_length).train["input_ids"]]


def _drawn(data: Any) -> Any:
    return data.train.shuffle(seed=0).select(range(min(MEASURED, len(data.train))))


def check_more_rows(
    data: Any, settings: CompressSettings, tokens_wanted: int, tokenizer: Any, table: Tensor
) -> None:
    """Raise `DataError`, before anything is trained, if `more_rows` could not make its rows."""
    drawn = data.train.shuffle(seed=0).select(range(min(SAMPLE, len(data.train))))
    head = replace(data, train=drawn)
    spliced = min(_splices(data, settings, tokens_wanted, tokenizer), 1)
    if settings.reword and not spliced:
        raise DataError(
            f"compress(reword={settings.reword}): {settings.task} has rows enough, so there are no "
            "splices, whose words it changes. Leave it out, or say how many with --splice."
        )
    once = replace(settings, splice=0, reword=None, augment=min(settings.augment, 1))
    more_rows(head, once, 0, tokenizer, table, text_rows=1)
    try:
        alone = replace(once, splice=spliced, augment=0, unlabelled=None)
        more_rows(head, alone, 0, tokenizer, table)
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
        share = settings.reword or 0.0
        extra.append(splice(data, count=spliced, seed=settings.seed, reword=share))
    if settings.augment:
        extra.append(augment(data, tokenizer, table, copies=settings.augment, seed=settings.seed))
    if settings.unlabelled is not None:
        extra.append(unlabelled_text(data.task, settings.unlabelled, limit=text_rows))
    return with_unlabelled(data, *extra)


def _splices(data: Any, settings: CompressSettings, wanted: int, tokenizer: Any) -> int:
    if settings.splice is not None:
        return settings.splice
    return splices_for(data, tokenizer, wanted, settings.max_length)
