"""Loads a task (GLUE from a folder or the hub, or any folder of tables) and tokenises it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from kronbert.distill.columns import (
    are_numbers,
    by_size,
    have_points,
    label_column,
    refuse_scores_without_number,
    text_columns,
)
from kronbert.distill.tasks import Task, compute_metrics, get_task
from kronbert.distill.text import FORMATS, FORMATS_IN_WORDS, PACKED, Table, kind_of, read_table
from kronbert.errors import DataError

__all__ = ["TaskData", "compute_metrics", "load_folder", "load_task", "row_lengths", "tokenize"]

TRAIN, DEV, TEST = ("train",), ("dev", "validation", "valid", "val"), ("test",)
MANY = 12
"""Classes that an error names."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Rows with the task's text columns and its label column (class index, or float).

    source: the files or the hub data set that the rows come from, for a report to name.
    unlabelled: more training rows without the label column, see `unlabelled.with_unlabelled`."""

    task: Task
    train: datasets.Dataset
    validation: dict[str, datasets.Dataset]
    source: str
    unlabelled: datasets.Dataset | None = None


def _split_files(folder: Path, words: tuple[str, ...]) -> list[Path]:
    """Files whose name is one of ``words``, or goes on after it with no letter."""
    pattern = re.compile(rf"({'|'.join(words)})(?![a-z]).*", re.IGNORECASE)
    files = sorted(p for p in folder.iterdir() if p.is_file() and pattern.fullmatch(p.name))
    return [p for p in files if kind_of(p) in FORMATS]


def _stem(path: Path) -> str:
    return path.name[: -len(kind_of(path) + (path.suffix if path.suffix in PACKED else ""))]


def _one_set(folder: Path, files: list[Path]) -> list[Path]:
    """The shards of one set; refuses two sets, for nobody said which is meant."""
    parts = [re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})", _stem(p)) for p in files]
    sets = {part and (part[1], int(part[3])) for part in parts}
    if len(files) > 1 and (len(sets) > 1 or None in sets):
        raise DataError(
            f"{folder}: {', '.join(p.name for p in files)}: which one is meant? "
            "Leave one of them in the folder, or rename the others."
        )
    found = [int(part[2]) for part in parts if part]
    for name, count in filter(None, sets):
        if missing := sorted(set(range(count)) - set(found)):
            raise DataError(
                f"{folder}: {name}: part {missing[0]} of {count} (counted from 0) is not there, "
                f"{len(found)} are. Fetch the whole set, or rename the files that are to be all."
            )
    return files


def _files(folder: Path, splits: tuple[str, ...]) -> tuple[list[Path], dict[str, list[Path]]]:
    """Training files, and files per dev set; before anything is read."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder. Expected train.* and dev.* ({FORMATS_IN_WORDS})."
        )
    names = [p.name for p in sorted(folder.iterdir())]
    found = f"It holds {', '.join(names[:8])}." if names else "It is empty."
    train = _one_set(folder, _split_files(folder, TRAIN))
    if not train:
        raise DataError(f"{folder}: no train.* file ({FORMATS_IN_WORDS}). {found}")
    dev = _split_files(folder, DEV) or _split_files(folder, TEST)
    if not dev:
        raise DataError(
            f"{folder}: no dev.*, validation.* or test.* file ({FORMATS_IN_WORDS}), so there is "
            f"nothing to measure on. {found} Put some hundred rows of train aside as dev."
        )
    if len(splits) == 1:
        return train, {splits[0]: _one_set(folder, dev)}
    # validation_matched <- dev_matched.tsv, validation_matched-00000-of-00001.parquet, ...
    sets = {
        s: [p for p in dev if s.split("_")[1] in re.split(r"[^a-z]+", _stem(p))] for s in splits
    }
    if not any(sets.values()):
        wanted = ", ".join(f"dev_{s.split('_')[1]}.*" for s in splits)
        raise DataError(f"{folder}: expected at least one of {wanted}. {found}")
    return train, {s: _one_set(folder, files) for s, files in sets.items() if files}


def _dataset(tables: list[Table], task: Task) -> datasets.Dataset:
    """The task's columns, labels encoded, of one set."""
    columns: dict[str, list[Any]] = {name: [] for name in (*task.text, task.label)}
    for table in tables:
        for name in task.text:
            values = table.columns[table.column(name)]
            if name == task.text[-1] != task.text[0]:  # a pair's second text may be missing
                values = ["" if value is None else value for value in values]
            for row, value in enumerate(values):
                if not isinstance(value, str):
                    raise DataError(
                        f"{table.where(row)}: column {name!r} is {value!r}: expected text."
                    )
            columns[name] += values
        label = table.column(task.label, *task.label_aliases)
        for row, value in enumerate(table.columns[label]):
            code = task.encode(value)
            if code is None:
                raise DataError(
                    f"{table.where(row)}: unknown label {value!r} in column {label!r}: expected "
                    f"{_expected(task)}. Correct or remove the row."
                )
            columns[task.label].append(code)
    return datasets.Dataset.from_dict(columns, features=_features(task))


def _expected(task: Task) -> str:
    if task.labels is None:
        return "a finite number"
    said = ", ".join(task.labels[:MANY])
    if len(task.labels) > MANY:
        said += f", ... ({len(task.labels)} classes)"
    whole = task.hub is None and all(name.lstrip("-").isdigit() for name in task.labels)
    return f"{said}, or scores (regression=True, --regression)" if whole else said


def _features(task: Task) -> datasets.Features:
    label = datasets.Value("float32") if task.labels is None else datasets.Value("int64")
    return datasets.Features({n: datasets.Value("string") for n in task.text} | {task.label: label})


def _limited(data: TaskData, limit: int | None, dev: int | None, seed: int) -> TaskData:
    def cut(rows: datasets.Dataset, most: int | None, name: str) -> datasets.Dataset:
        if most is None or most >= len(rows):
            return rows
        if most < 1:
            raise DataError(f"limit={most}: expected a number of rows, 1 or more.")
        notes.append(f"{most} of {len(rows)} {name} rows, seed {seed}")
        return rows.shuffle(seed=seed).select(range(most))

    notes: list[str] = []
    train = cut(data.train, limit, "train")
    validation = {name: cut(rows, dev, name) for name, rows in data.validation.items()}
    source = "; ".join([data.source, *notes])
    return replace(data, train=train, validation=validation, source=source)


def _from_files(task: Task, folder: Path, tables: list[Table] | None = None) -> TaskData:
    """tables: the training files, where they have been read already."""
    train_files, dev_files = _files(folder, task.splits)
    source = f"{folder.name}/" + ", ".join(p.name for p in sum(dev_files.values(), train_files))
    train = _dataset(tables or [read_table(p) for p in train_files], task)
    validation = {s: _dataset([read_table(p) for p in ps], task) for s, ps in dev_files.items()}
    return TaskData(task=task, train=train, validation=validation, source=source)


def _from_hub(task: Task) -> TaskData:
    if task.hub is None:
        raise DataError(f"task {task.name!r} is not on the hub: pass --data-dir (data_dir=...).")
    try:
        loaded = datasets.load_dataset(task.hub, task.hub_config)
    except Exception as error:  # the client raises its own, httpx's, OSError and ValueError
        raise DataError(
            f"task {task.name!r}: {task.hub} could not be had from the Hugging Face hub ({error}). "
            f"Without network, pass --data-dir (data_dir=...): a folder that holds {task.name}/ "
            "with train.* and dev.* files."
        ) from error

    def columns(split: str) -> datasets.Dataset:
        rows = loaded.get(split, {})
        missing = {*task.text, task.label} - set(getattr(rows, "column_names", ()))
        if missing:
            raise DataError(f"{task.hub}: no split {split!r} with columns {sorted(missing)}.")
        names = getattr(rows.features[task.label], "names", None)
        if task.labels and names and tuple(names) != task.labels:
            raise DataError(f"{task.hub}: labels {names}, but {task.name!r} has {task.labels}.")
        return rows.select_columns([*task.text, task.label]).cast(_features(task))

    return TaskData(
        task=task,
        train=columns("train"),
        validation={split: columns(split) for split in task.splits},
        source=f"Hugging Face hub: {task.hub} ({task.hub_config})",
    )


def load_task(
    task: str | Path | Task,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    limit_validation: int | None = None,
    seed: int = 0,
) -> TaskData:
    """A GLUE task by name, from ``data_dir/<task>/`` or the Hugging Face hub; or a folder's own.

    limit, limit_validation: at most so many rows, drawn with ``seed``; ``source`` then says so.
    """
    if isinstance(task, Path) or (isinstance(task, str) and is_folder(task)):
        if data_dir is not None:
            raise DataError(f"task {str(task)!r} is a folder itself: leave --data-dir out.")
        return load_folder(task, limit=limit, limit_validation=limit_validation, seed=seed)
    if isinstance(task, str):
        task = get_task(task)
    if data_dir is None:
        data = _from_hub(task)
    else:
        root = Path(data_dir)
        if not root.is_dir():
            raise DataError(f"--data-dir {root}: no such folder.")
        spelt = {
            p.name.lower().replace("-", "").replace("_", ""): p for p in sorted(root.iterdir())
        }
        folder = spelt.get(task.name.replace("-", "").replace("_", ""))
        if folder is None:
            hint = " Pass the folder above it." if _split_files(root, TRAIN) else ""
            raise DataError(
                f"--data-dir {root}: no folder {task.name}/ in it (it holds "
                f"{', '.join(p.name for p in spelt.values()) or 'nothing'}).{hint}"
            )
        data = _from_files(task, folder)
    return _limited(data, limit, limit_validation, seed)


def is_folder(name: str | Path) -> bool:
    """A path by its looks, or a folder that is not named like a GLUE task."""
    name = str(name)
    try:
        get_task(name)
    except DataError:
        return "/" in name or "\\" in name or Path(name).is_dir()
    return False


def load_folder(
    folder: str | Path,
    *,
    text: str | tuple[str, ...] | None = None,
    label: str | None = None,
    regression: bool | None = None,
    numbers_are_scores: bool | None = None,
    classes: Sequence[str] | None = None,
    max_length: int = 128,
    limit: int | None = None,
    limit_validation: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Any folder with train.* and dev.* (or validation.*, else test.*).

    Columns are inferred from their names where only one reading exists. Class names are those of
    train, sorted (numbers by size), or in the order of ``classes`` if these are the same but for
    their case. ``regression`` says whether labels are scores; None: numbers are, if they are
    written with a point, or as ``numbers_are_scores`` says.
    """
    folder = Path(folder)
    tables = [read_table(p) for p in _files(folder, ("validation",))[0]]
    first = tables[0]
    columns = (text,) if isinstance(text, str) else text or text_columns(first)
    column = first.column(label) if label else label_column(first)
    values = [v for t in tables for v in t.columns[t.column(column)]]
    for table in tables:
        for row, value in enumerate(table.columns[column]):
            # NaN is how pandas writes a cell that is empty.
            if value is None or value != value or not str(value).strip():
                raise DataError(
                    f"{table.where(row)}: no label in column {column!r}: remove the row."
                )
            if isinstance(value, list | dict):
                raise DataError(
                    f"{table.where(row)}: label {value!r} in column {column!r}: expected one class "
                    "or one number a row; tasks of several labels a row are not known."
                )
    if regression is None:
        refuse_scores_without_number(tables, column)
        regression = are_numbers(values) and (
            have_points(values) if numbers_are_scores is None else numbers_are_scores
        )
    written = {str(value).strip() for value in values}
    if are_numbers(values):  # one class may be 1 in a file and 1.0 in another
        written = {name.removesuffix(".0") for name in written}
    names = None if regression else tuple(sorted(written, key=by_size))
    if names is not None and len(names) < 2:
        raise DataError(
            f"{first.path}: column {column!r} is {names[0]!r} in every row: expected two classes "
            "or more. For scores pass regression=True (--regression)."
        )
    if names is not None:
        names = _in_order(names, [str(name) for name in classes or ()])
    kept = ("spearman", "pearson") if regression else ("accuracy", "macro_f1")
    task = Task(name=folder.resolve().name, text=columns, label=column, labels=names, indices=False,
                metrics=kept, primary=kept[0], max_length=max_length)  # fmt: skip
    return _limited(_from_files(task, folder, tables), limit, limit_validation, seed)


def _in_order(names: tuple[str, ...], order: list[str]) -> tuple[str, ...]:
    """``names`` in this order, if it is of the same names, or of the same but for their case."""
    if sorted(order) == sorted(names):
        return tuple(order)
    lower = [name.lower() for name in order]
    if sorted(lower) == sorted(name.lower() for name in names) and len({*lower}) == len(lower):
        return tuple(sorted(names, key=lambda name: lower.index(name.lower())))
    return names


def tokenize(data: TaskData, tokenizer: Any, max_length: int | None = None) -> TaskData:
    """The same rows as input_ids, attention_mask, token_type_ids (where the tokenizer has them)
    and labels, cut to ``max_length`` tokens (default: the task's); no padding."""
    task = data.task
    longest = int(tokenizer.model_max_length)
    if max_length is not None and max_length > longest:
        raise DataError(
            f"tokenize(max_length={max_length}): the tokenizer's model takes {longest}."
        )
    length = min(task.max_length, longest) if max_length is None else max_length
    special = int(tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2))
    if length <= special:
        raise DataError(
            f"tokenize(max_length={length}): {special} tokens of a row are the tokenizer's own, "
            "which leaves none for the text. Give 8 or more."
        )

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(rows[n] for n in task.text), truncation=True, max_length=length)
        return {**encoded, "labels": rows[task.label]} if task.label in rows else {**encoded}

    def run(rows: datasets.Dataset) -> datasets.Dataset:
        given = rows.column_names
        found = rows.map(encode, batched=True, remove_columns=given, desc="Tokenising")
        if special == 0 and (empty := [i for i, n in enumerate(row_lengths(found)) if not n]):
            raise DataError(
                f"{data.source}: {len(empty)} rows without a token, such as "
                f"{dict(rows[empty[0]])}: this tokenizer adds none of its own. Remove them."
            )
        return found

    validation = {name: run(rows) for name, rows in data.validation.items()}
    extra = None if data.unlabelled is None else run(data.unlabelled)
    return replace(data, train=run(data.train), validation=validation, unlabelled=extra)


def row_lengths(rows: datasets.Dataset) -> list[int]:
    """Tokens of each tokenised row, of all its choices, without padding. Read 1,000 rows at a time:
    94,000 shuffled ones took 0.9 s on a core beside other work, one by one 9.0."""
    rows = rows.with_format(None)
    if "attention_mask" in rows.column_names:
        masks = rows.select_columns("attention_mask")
        return [_ones(mask) for some in masks.iter(1000) for mask in some["attention_mask"]]
    tokens = rows.select_columns("input_ids")
    return [len(ids) for some in tokens.iter(1000) for ids in some["input_ids"]]


def _ones(mask: Any) -> int:
    return sum(map(_ones, mask) if mask and isinstance(mask[0], list) else mask)
