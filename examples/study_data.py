"""The rows of the GLUE study: a task's own, those without labels, and those of another origin."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import datasets
import study_settings as settings  # type: ignore[import-not-found]

from kronbert.distill import (
    Stage,
    augment,
    load_task,
    splice,
    tokenize,
    unlabelled_rows,
    unlabelled_text,
    with_unlabelled,
)
from kronbert.distill.data import TaskData, load_folder
from kronbert.distill.digests import data_digest
from kronbert.distill.recipes.kronbert import tokens_wanted
from kronbert.distill.text import read_table
from kronbert.errors import DataError
from kronbert.job_models import open_model
from kronbert.job_rows import splices_for, tokens_in


class Rows:
    """Tokenised rows of a task, as ``options`` (--data-dir, --limit, --text, --ood-dir) say."""

    def __init__(self, options: Any, tokenizer: Any) -> None:
        self.options, self.tokenizer = options, tokenizer

    @cache  # noqa: B019 - one study lives as long as its process
    def digest(self, task: str) -> str:
        """Of the contents of the task's own rows."""
        data = load_task(task, data_dir=self.options.data_dir, limit=self.options.limit)
        return data_digest(data)

    @lru_cache(maxsize=1)  # noqa: B019 - one study lives as long as its process
    def _tokens(
        self,
        task: str,
        spliced: int | None,
        reword: float,
        copies: int,
        sentences: int,
        transfer: tuple[tuple[str, int], ...],
    ) -> TaskData:
        data = load_task(task, data_dir=self.options.data_dir, limit=self.options.limit)
        more = []
        if spliced is None:
            wanted = tokens_wanted(task, tokens_in(data, self.tokenizer))
            spliced = splices_for(data, self.tokenizer, wanted)
        if reword and not spliced:
            raise DataError(f"reword={reword}: {task} has rows enough, so no splices: give splice.")
        if copies:
            table = open_model(self.options.model).get_input_embeddings().weight.detach()
            more.append(augment(data, self.tokenizer, table, copies=copies))
        if spliced:
            more.append(splice(data, count=spliced, reword=reword))
        if sentences:
            more.append(unlabelled_text(data.task, self._source(), limit=sentences))
        for name, limit in transfer:
            other = load_task(name, data_dir=self.options.data_dir)
            rows = other.train.shuffle(seed=settings.SEARCH_SEED)
            more.append(unlabelled_rows(data.task, rows, other.task.text, limit=limit))
        return tokenize(with_unlabelled(data, *more), self.tokenizer)

    @lru_cache(maxsize=len(settings.FULL + settings.PARTIAL))  # noqa: B019 - as above
    def count(self, task: str) -> int:
        """Tokens of the task's own training rows."""
        data = load_task(task, data_dir=self.options.data_dir, limit=self.options.limit)
        return tokens_in(data, self.tokenizer)

    def tokens(self, task: str, training: Any = None) -> TaskData:
        """The task's rows, with those without a label that the training wants."""
        if training is None:
            return self._tokens(task, 0, 0.0, 0, 0, ())
        transfer = tuple(training.transfer.items())
        own = (training.splice, training.reword, training.augment)
        return self._tokens(task, *own, training.text_rows, transfer)

    def of_teacher(self, task: str) -> TaskData:
        """The rows that the task's teacher learns from: MNLI's and those of --snli-dir, if any."""
        folder = self.options.snli_dir
        if task not in settings.WITH_SNLI or folder is None:
            return self.tokens(task)
        data = load_task(task, data_dir=self.options.data_dir, limit=self.options.limit)
        return tokenize(with_labelled(data, folder), self.tokenizer)

    def text(self, data: TaskData, sentences: int) -> Any:
        if not sentences:
            return ()
        rows = unlabelled_text(data.task, self._source(), limit=sentences)
        extra = TaskData(task=data.task, train=rows, validation={}, source="")
        return tokenize(extra, self.tokenizer).train

    def _source(self) -> str:
        if self.options.text is None:
            raise DataError("text_rows, calibration_text: --text names no text to take them from.")
        return str(self.options.text)

    def outside(self, task: Any) -> TaskData | None:
        """The task's set out of distribution, if it has one and --ood-dir names a folder."""
        if not self.options.ood_dir or task.name not in settings.OUTSIDE:
            return None
        rows = outside_of(task, self.options.ood_dir, self.options.ood_limit)
        return tokenize(rows, self.tokenizer)


def rows_of(stage: Stage, data: TaskData) -> TaskData:
    """``data`` without the rows that have no label, for a stage that reads labels."""
    return data if stage.objective.label_tap is None else replace(data, unlabelled=None)


def with_labelled(data: TaskData, folder: str) -> TaskData:
    """``data`` with the training rows of another folder behind its own: the same columns and
    classes, else `DataError`."""
    task = data.task
    other = load_folder(folder, text=task.text, label=task.label)
    names = other.task.labels or ()
    if unknown := [name for name in names if task.encode(name) is None] or not names:
        raise DataError(
            f"{folder}: labels {unknown if names else 'are numbers'}, but {task.name!r} has "
            f"{task.labels}."
        )
    codes = [task.encode(name) for name in names]
    told = [codes[label] for label in other.train[task.label]]
    more = datasets.Dataset.from_dict(
        {**{name: other.train[name] for name in task.text}, task.label: told},
        features=data.train.features,
    )
    train = datasets.concatenate_datasets([data.train, more])
    source = f"{data.source}; {other.source.split(',')[0]}"
    return replace(data, train=train, source=source)


def outside_of(task: Any, folder: str, limit: int) -> TaskData:
    """The task's set out of distribution: at most ``limit`` rows, evenly spaced."""
    name, file, columns = settings.OUTSIDE[task.name]
    found = [path for end in ("", ".gz", ".xz") if (path := Path(folder, file + end)).is_file()]
    if not found:
        raise DataError(f"--ood-dir {folder}: no {file} in it (or .gz, .xz).")
    table = read_table(found[0])
    count = min(limit, len(table))
    picked = [i * len(table) // count for i in range(count)]
    rows = {
        own: [table.columns[table.column(other)][i] for i in picked]
        for own, other in zip(task.text, columns, strict=True)
    }
    labels = [task.encode(table.columns[table.column(task.label)][i]) for i in picked]
    if None in labels:
        raise DataError(f"{table.where(picked[labels.index(None)])}: a label {task.name} has not.")
    rows[task.label] = labels
    source = f"{found[0].parent.name}/{found[0].name}"
    if count < len(table):
        source += f"; {count} of {len(table)} rows, evenly spaced"
    kept = datasets.Dataset.from_dict(rows)
    return TaskData(task=task, train=kept.select([0]), validation={name: kept}, source=source)
