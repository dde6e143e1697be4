"""Hashes of rows, and of what a model is made of: whether a run goes on with what it began."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow
from torch import nn

if TYPE_CHECKING:
    from kronbert.distill.data import TaskData


def data_digest(data: TaskData) -> str:
    """Of a task's training and dev rows, labels and texts (or tokens) included."""
    seen = hashlib.sha256()
    for name, rows in {"train": data.train, **data.validation}.items():
        seen.update(f"{name} {rows_digest(rows)} ".encode())
    if data.unlabelled is not None:
        seen.update(rows_digest(data.unlabelled).encode())
    return seen.hexdigest()[:16]


def rows_digest(rows: datasets.Dataset) -> str:
    """A hash of the columns' names and values, in the rows' order."""
    seen = hashlib.sha256()
    table = rows.with_format("arrow")
    for start in range(0, len(rows), 10_000):
        batch = table[start : start + 10_000]
        for name in sorted(batch.column_names):
            values = batch.column(name).combine_chunks()
            seen.update(name.encode())
            listed = pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type)
            if listed and pyarrow.types.is_primitive(values.type.value_type):
                seen.update(np.asarray(values.value_lengths()).tobytes())
                seen.update(values.flatten().to_numpy(zero_copy_only=False).tobytes())
            else:
                seen.update(repr(values.to_pylist()).encode())
    return seen.hexdigest()


def structure_digest(model: nn.Module) -> str:
    """A hash of the class and of the parameters' names, shapes and whether they are trained."""
    told = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    return hashlib.sha256(f"{type(model).__name__} {sorted(told)}".encode()).hexdigest()[:16]
