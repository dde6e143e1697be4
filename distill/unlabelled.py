"""Rows without a label for a task: running text, or another task's sentences, in its columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from kronbert.distill.sentences import split_sentences
from kronbert.distill.tasks import Task
from kronbert.distill.text import ROWS_AT_ONCE, load_text
from kronbert.errors import DataError, DistillError

if TYPE_CHECKING:
    from kronbert.distill.data import TaskData
    from kronbert.distill.stages import Stage

TEXTS = ("string", "large_string", "string_view")
"""Types of a column of text."""


def unlabelled_text(
    task: Task,
    source: str | Path | datasets.Dataset,
    *,
    limit: int | None = None,
    words: tuple[int, int] = (3, 64),
) -> datasets.Dataset:
    """Sentences of running text as rows with the task's text columns.

    source: as for `text.load_text` (one paragraph per line), or a `Dataset` with a column ``text``.
    A pair is two sentences that follow each other in a paragraph; no sentence is in two pairs.
    words: fewest and most between blanks; other sentences are left out, and part the text.
    limit: at most so many rows, from the start."""
    few, most = words
    if not 1 <= few <= most:
        raise DataError(f"unlabelled_text(words={words}): expected fewest and most words, from 1.")
    rows = source if isinstance(source, datasets.Dataset) else load_text(source)

    def found() -> Iterator[tuple[str, ...]]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            for paragraph in rows[start : start + ROWS_AT_ONCE]["text"]:
                parts: list[str] = []
                for sentence in split_sentences(paragraph):
                    if few <= len(sentence.split()) <= most:
                        parts.append(sentence)
                    else:
                        parts.clear()
                    if len(parts) == len(task.text):
                        yield tuple(parts)
                        parts.clear()

    name = "the data set" if isinstance(source, datasets.Dataset) else str(source)
    return _filled(task, found(), limit, name)


def unlabelled_rows(
    task: Task,
    rows: datasets.Dataset,
    columns: str | Sequence[str],
    *,
    limit: int | None = None,
) -> datasets.Dataset:
    """Another data set's sentences as rows with the task's text columns.

    columns: where the texts are, as many as the task has text columns. For a task on single
    sentences two columns give two rows; for a pair one column gives pairs of rows that follow each
    other. Rows without a text, or with an empty one, are left out. limit: at most so many rows,
    from the start."""
    names = (columns,) if isinstance(columns, str) else tuple(columns)
    if not 1 <= len(names) <= 2 or not set(names) <= set(rows.column_names):
        raise DataError(
            f"unlabelled_rows(columns={columns!r}): expected one or two of "
            f"{', '.join(map(repr, rows.column_names))}."
        )
    if wrong := [n for n in names if getattr(rows.features[n], "dtype", None) not in TEXTS]:
        raise DataError(f"unlabelled_rows: {wrong[0]!r} holds {rows.features[wrong[0]]}, no text.")
    width = len(task.text)

    def texts() -> Iterator[str]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            for row in zip(*(batch[name] for name in names), strict=True):
                if all(text and text.strip() for text in row):
                    yield from row

    def found() -> Iterator[tuple[str, ...]]:
        each = texts()
        while len(row := tuple(islice(each, width))) == width:
            yield row

    return _filled(task, found(), limit, f"columns {', '.join(names)}")


def with_unlabelled(data: TaskData, *extra: datasets.Dataset) -> TaskData:
    """``data`` with more rows without a label, for stages whose objective reads no label.

    extra: from `augment`, `unlabelled_text` or `unlabelled_rows`; before `tokenize`."""
    for rows in extra:
        if tuple(rows.column_names) != data.task.text:
            raise DataError(
                f"with_unlabelled: columns {rows.column_names}, but task {data.task.name!r} needs "
                f"{list(data.task.text)}, before tokenize. Make the rows with augment, "
                "unlabelled_text or unlabelled_rows."
            )
    if not extra:
        return data
    parts = [rows for rows in (data.unlabelled, *extra) if rows is not None]
    rows = datasets.concatenate_datasets(parts)
    source = f"{data.source}; {sum(map(len, extra))} rows without a label"
    return replace(data, unlabelled=rows, source=source)


def training_rows(data: TaskData, stage: Stage) -> datasets.Dataset:
    """The tokenised rows that ``stage`` trains on: with those without a label if it reads none."""
    if data.unlabelled is None:
        return data.train
    if stage.objective.label_tap is not None:
        raise DistillError(
            f"Stage({stage.name!r}) learns from labels, but {len(data.unlabelled)} of "
            f"{len(data.unlabelled) + len(data.train)} training rows have none. Drop the term "
            f"{stage.objective.label_tap!r} (the teacher's logits are soft labels), or pass "
            "dataclasses.replace(data, unlabelled=None)."
        )
    if missing := set(data.unlabelled.column_names) - set(data.train.column_names):
        raise DistillError(
            f"Stage({stage.name!r}): the rows without a label have the columns {sorted(missing)}, "
            "the others not: tokenize both at once, after with_unlabelled."
        )
    labelled = data.train.select_columns(data.unlabelled.column_names)
    return datasets.concatenate_datasets([labelled, data.unlabelled])


def text_table(task: Task, rows: Iterable[tuple[str, ...]]) -> datasets.Dataset:
    """A `Dataset` of the task's text columns, filled chunk by chunk."""
    schema = pa.schema([(name, pa.string()) for name in task.text])
    chunks, each = [], iter(rows)
    while batch := list(islice(each, 10 * ROWS_AT_ONCE)):
        columns = [list(column) for column in zip(*batch, strict=True)]
        chunks.append(pa.record_batch(columns, schema=schema))
    return datasets.Dataset(InMemoryTable(pa.Table.from_batches(chunks, schema)))


def _filled(
    task: Task, rows: Iterator[tuple[str, ...]], limit: int | None, source: str
) -> datasets.Dataset:
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: expected a number of rows, 1 or more.")
    table = text_table(task, islice(rows, limit))
    if not len(table):
        kind = "sentence" if len(task.text) == 1 else "pair of sentences"
        raise DataError(f"{source}: no {kind} in it for the columns {', '.join(task.text)}.")
    return table
