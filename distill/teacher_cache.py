"""The teacher's logits of all training rows, computed once and kept on disk for every later run.

A stage on soft labels alone reads one small vector per row of the teacher; the same vectors serve
every epoch, every student and every learning rate."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.table import InMemoryTable
from torch import nn
from transformers import DataCollatorWithPadding

from kronbert.errors import DistillError

TEACHER_LOGITS = "teacher_logits"
"""The column of the training rows that `DistillTrainer` takes for the teacher's logits."""

SAVED_EVERY = 100
"""Batches between two notes of how far the computation is."""

# What a configuration says of its origin and not of the function that the model is.
_NO_MATTER = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def with_teacher_logits(
    rows: datasets.Dataset,
    teacher: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    batch_size: int = 64,
    say: Callable[[str], None] | None = None,
) -> datasets.Dataset:
    """Tokenised ``rows`` with the column `TEACHER_LOGITS`, (rows, classes) in float32.

    The vectors lie in ``folder`` as <digest>.npy; the digest covers the teacher's weights and
    configuration, the rows' inputs and ``autocast``, so an equal run reads them and any other one
    computes its own. An interrupted computation is continued. The teacher is put in eval mode on
    ``device``, unless it is spread over several. Raises `DistillError` for logits that are not one
    finite vector per row."""
    taken = [
        name for name in rows.column_names if name in inspect.signature(teacher.forward).parameters
    ]
    inputs = rows.select_columns([name for name in taken if name != "labels"])
    key = _digest([model_digest(teacher), rows_digest(inputs), str(autocast)])
    path = Path(folder) / f"{key}.npy"
    if path.is_file():
        if say is not None:
            say(f"teacher's logits of {len(rows)} rows: {path}")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        teacher.eval()
        if getattr(teacher, "hf_device_map", None) is None:
            teacher.to(device)
        _compute(inputs, teacher, path, DataCollatorWithPadding(tokenizer), autocast, batch_size)
    logits = np.load(path)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    column = datasets.Dataset(InMemoryTable(pa.table({TEACHER_LOGITS: vectors})))
    return datasets.concatenate_datasets([rows, column], axis=1)


def _compute(
    rows: datasets.Dataset,
    teacher: nn.Module,
    path: Path,
    collate: Any,
    autocast: torch.dtype | None,
    batch_size: int,
) -> None:
    """Write ``path``; rows of one length share a batch. What is done is noted beside it."""
    part, note = path.with_suffix(".part"), path.with_suffix(".json")
    order = np.argsort(_lengths(rows), kind="stable")
    done = json.loads(note.read_text())["done"] if note.is_file() and part.is_file() else 0
    out = np.load(part, mmap_mode="r+") if done else None
    for number, start in enumerate(range(done, len(order), batch_size), start=1):
        picked = order[start : start + batch_size]
        logits = _logits(teacher, collate([rows[int(i)] for i in picked]), autocast)
        if logits.ndim != 2:
            raise DistillError(
                f"cache_teacher: {type(teacher).__name__} gives logits {logits.shape} for "
                f"{len(picked)} rows: only one vector per row is kept. Set cache_teacher=False."
            )
        if not np.isfinite(logits).all():
            bad = int(picked[~np.isfinite(logits).all(1)][0])
            raise DistillError(
                f"cache_teacher: the teacher's logits of row {bad} are not finite: its training "
                "diverged. Fine-tune it with a lower learning rate."
            )
        if out is None:
            shape = (len(rows), logits.shape[1])
            out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        out[picked] = logits
        if number % SAVED_EVERY == 0:
            out.flush()
            note.with_suffix(".new").write_text(json.dumps({"done": start + len(picked)}))
            os.replace(note.with_suffix(".new"), note)
    if out is None:
        raise DistillError("cache_teacher: no training rows. Give one at least.")
    out.flush()
    del out  # closed before it is renamed
    os.replace(part, path)
    note.unlink(missing_ok=True)


def _logits(teacher: nn.Module, batch: Any, autocast: torch.dtype | None) -> np.ndarray:
    device = next(teacher.parameters()).device
    mixed = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    with torch.inference_mode(), mixed:
        found = teacher(**{name: value.to(device) for name, value in batch.items()}).logits
    return np.asarray(found.float().cpu().numpy())


def _lengths(rows: datasets.Dataset) -> list[int]:
    return [len(ids) for ids in rows["input_ids"]]


def model_digest(model: nn.Module) -> str:
    """A hash of the class, the weights and buffers that are saved, and the configuration."""
    config: Any = model.config
    told = {k: v for k, v in config.to_dict().items() if k not in _NO_MATTER}
    seen = hashlib.sha256(f"{type(model).__name__} {json.dumps(told, sort_keys=True)}".encode())
    for name, tensor in model.state_dict().items():
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


def rows_digest(rows: datasets.Dataset) -> str:
    """A hash of the columns' names, lengths and numbers, in the rows' order."""
    seen = hashlib.sha256()
    table = rows.with_format("arrow")
    for start in range(0, len(rows), 10_000):
        batch = table[start : start + 10_000]
        for name in sorted(batch.column_names):
            values = batch.column(name).combine_chunks()
            seen.update(name.encode())
            seen.update(np.asarray(values.value_lengths()).tobytes())
            seen.update(values.flatten().to_numpy(zero_copy_only=False).tobytes())
    return seen.hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
