"""What the teacher gives for all training rows, computed once and kept on disk for later runs.

Logits are one small vector per row, hidden states one vector per token and layer: 5.4 kB a token of
a MiniLM of 6 layers, 5.4 GB for a million. The same numbers serve every epoch, every student and
every learning rate."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.table import InMemoryTable
from filelock import FileLock
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from kronbert.distill.data import row_lengths
from kronbert.distill.digests import rows_digest
from kronbert.distill.score_head import exact_scores
from kronbert.distill.taps import Captured, Taps, inputs_of
from kronbert.errors import DistillError
from kronbert.prepared import own_forward

TEACHER_LOGITS = "teacher_logits"
"""The column of the training rows that `DistillTrainer` takes for the teacher's logits."""

TEACHER_ROW = "teacher_row"
"""The column that says which of the rows on disk one is: its states are read by `WithStates`."""

TEACHER_STATES = "teacher_states"
"""The batch's hidden states of the teacher, (batch, tokens, states, width) in float16."""

TEACHER_LAYERS = "teacher_layers"
"""`States.layers` of each of its rows, (batch, states)."""

SAVED_EVERY = 100
"""Batches between two notes of how far the computation is."""

# What a configuration says of its origin and not of the function that the model is.
_NO_MATTER = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


@dataclass(frozen=True)
class States:
    """Hidden states on disk: of row i the tokens from starts[i] to starts[i + 1].

    layers: which states a token has, in this order; 0 is the embedding's output."""

    values: np.memmap
    starts: np.ndarray
    layers: tuple[int, ...]

    def of(self, rows: Sequence[int]) -> Tensor:
        """(their tokens in a line, states, width), in float16.

        Read from the file, not from the mapping: a fault of a mapping reads ahead as far as the
        disk is set to, 60 times what rows drawn at random take where that is 8 MB (measured)."""
        bounds = [(int(self.starts[i]), int(self.starts[i + 1])) for i in rows]
        tokens, place = sum(end - start for start, end in bounds), 0
        found = np.empty((tokens, *self.values.shape[1:]), self.values.dtype)
        each = self.values.strides[0]
        with FileIO(str(self.values.filename)) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for start, end in bounds:
                part = found[place : (place := place + end - start)]
                file.seek(self.values.offset + start * each)
                if file.readinto(part.data) < part.nbytes:
                    raise DistillError(f"{file.name}: cut short. Remove it; it is made anew.")
        return torch.from_numpy(found)


class WithStates:
    """A collator that puts the teacher's `States` beside what ``collate`` makes of the rows."""

    def __init__(self, collate: Any, states: States) -> None:
        self.collate, self.states = collate, states

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collate([{k: v for k, v in row.items() if k != TEACHER_ROW} for row in rows])
        if all(TEACHER_ROW in row for row in rows):  # not in evaluation
            tokens = batch["attention_mask"].bool()
            found = self.states.of([row[TEACHER_ROW] for row in rows])
            padded = found.new_zeros(*tokens.shape, *found.shape[1:])
            padded[tokens] = found
            batch[TEACHER_STATES] = padded
            batch[TEACHER_LAYERS] = torch.tensor(self.states.layers).expand(len(rows), -1)
        return batch


def as_captured(states: Tensor, layers: Sequence[int], wanted: Iterable[int]) -> Captured:
    """A batch's states as the teacher's taps would have seen those ``wanted``; layers: which there
    are, as in `States`. `DistillError` where one is missing."""
    found = Captured()
    for layer in wanted:
        if layer not in layers:
            raise DistillError(
                f"the objective reads layer {layer} of the teacher (0: its embedding), the states "
                f"beside the rows are of {', '.join(map(str, layers))}: make them with "
                "with_teacher(layers=...) of this objective."
            )
        state = states[:, :, layers.index(layer)]
        if layer:
            found.ffn[layer] = state
        else:
            found.embedding = state
    return found


def states_wanted(taps: Iterable[str], layers: Iterable[int]) -> tuple[int, ...]:
    """`States.layers` of an objective's teacher taps and its resolved layer map."""
    embedding = (0,) if "embedding" in taps else ()
    return (*embedding, *sorted({n for n in layers if n})) if "ffn" in taps else embedding


def with_teacher(
    rows: datasets.Dataset,
    teacher: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any,
    layers: Sequence[int] = (),
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    batch_size: int = 64,
    say: Callable[[str], None] | None = None,
) -> tuple[datasets.Dataset, States | None]:
    """Tokenised ``rows`` with the column `TEACHER_LOGITS`, (rows, classes) in float32, and, with
    ``layers`` (`States.layers`), the column `TEACHER_ROW` and the `States` it points at.

    The numbers lie in ``folder`` as <digest>.npy and <digest>-states.npy; the digest covers the
    teacher's weights and configuration, the rows' inputs, ``layers`` and ``autocast``, so an equal
    run reads them and any other one computes its own. An interrupted computation is continued. The
    teacher is put in eval mode on ``device``, unless it is spread over several. Raises
    `DistillError` for logits that are not one finite vector per row, for states that float16 cannot
    hold, and where the disk is too small."""
    known = inputs_of(teacher)
    taken = [name for name in rows.column_names if name in known]
    inputs = rows.select_columns([name for name in taken if name != "labels"])
    asked = [str(list(layers))] if layers else []
    key = _digest([model_digest(teacher), rows_digest(inputs), str(autocast), *asked])
    path, beside = Path(folder) / f"{key}.npy", Path(folder) / f"{key}-states.npy"
    lengths = row_lengths(inputs)
    path.parent.mkdir(parents=True, exist_ok=True)

    def whole() -> bool:
        return path.is_file() and (not layers or beside.is_file())

    # Runs side by side may share a folder: one computes, the others wait for it.
    with nullcontext() if whole() else FileLock(path.with_suffix(".lock")):
        if whole():
            if say is not None:
                what = "logits and hidden states" if layers else "logits"
                say(f"teacher's {what} of {len(rows)} rows: {path}")
        else:
            teacher.eval()
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(device)
            reader = _Reader(teacher, tuple(layers), autocast)
            with own_forward(teacher), exact_scores(teacher):
                _compute(inputs, lengths, reader, path, beside, DataCollatorWithPadding(tokenizer),
                         batch_size)  # fmt: skip
    logits = np.load(path)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    columns: dict[str, Any] = {TEACHER_LOGITS: vectors}
    states = None
    if layers:
        columns[TEACHER_ROW] = pa.array(range(len(rows)))
        states = States(np.load(beside, mmap_mode="r"), _starts(lengths), tuple(layers))
    column = datasets.Dataset(InMemoryTable(pa.table(columns)))
    return datasets.concatenate_datasets([rows, column], axis=1), states


class _Reader:
    """The teacher's logits (rows, classes) of a batch, and the states of its tokens in a line."""

    def __init__(
        self, teacher: nn.Module, layers: tuple[int, ...], autocast: torch.dtype | None
    ) -> None:
        self.teacher, self.layers, self.autocast = teacher, layers, autocast
        needs = {"ffn" if layer else "embedding" for layer in layers}
        self.taps = Taps(teacher, needs, [layer for layer in layers if layer]) if layers else None
        self.width = int(getattr(teacher.config, "hidden_size", 0)) if layers else 0

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray | None]:
        device = next(self.teacher.parameters()).device
        given = {name: value.to(device) for name, value in batch.items()}
        mixed = nullcontext()
        if self.autocast is not None:
            mixed = torch.autocast(device.type, self.autocast)  # type: ignore[assignment]
        with torch.inference_mode(), mixed:
            if self.taps is None:
                return self._logits(given), None
            with self.taps.capture() as seen:
                logits = self._logits(given)
            tokens = given["attention_mask"].bool()
            each = [seen.ffn[layer] if layer else seen.embedding for layer in self.layers]
            states = torch.stack([state[tokens] for state in each if state is not None], dim=1)
            return logits, np.asarray(states.half().cpu().numpy())

    def _logits(self, given: Mapping[str, Tensor]) -> np.ndarray:
        logits = getattr(self.teacher(**given), "logits", None)
        if logits is None:
            raise DistillError(
                f"cache_teacher: {type(self.teacher).__name__} gives no logits of one vector a "
                "row. Give the teacher of a task of classes or scores, or set cache_teacher=False."
            )
        return np.asarray(logits.float().cpu().numpy())


def _compute(
    rows: datasets.Dataset,
    lengths: Sequence[int],
    reader: _Reader,
    path: Path,
    beside: Path,
    collate: Any,
    batch_size: int,
) -> None:
    """Write ``path``, and ``beside`` where the reader has states; rows of one length share a batch.
    What is done is noted beside them."""
    part, states_part, note = (
        path.with_suffix(".part"), beside.with_suffix(".part"), path.with_suffix(".json")
    )  # fmt: skip
    order, starts = np.argsort(lengths, kind="stable"), _starts(lengths)
    parts = [part, states_part] if reader.layers else [part]
    whole = note.is_file() and all(one.is_file() for one in parts)
    done = json.loads(note.read_text())["done"] if whole else 0
    if not done:
        note.unlink(missing_ok=True)  # of parts that are gone: it would skip rows of the new ones
        _need_space(path.parent, 2 * int(starts[-1]) * len(reader.layers) * reader.width)
    outs = [np.load(one, mmap_mode="r+") for one in parts] if done else []
    for number, start in enumerate(range(done, len(order), batch_size), start=1):
        picked = order[start : start + batch_size]
        logits, states = reader(collate([rows[int(i)] for i in picked]))
        _check(logits, states, picked, type(reader.teacher).__name__)
        if not outs:
            outs = [_opened(part, np.float32, (len(rows), logits.shape[1]))]
            if states is not None:
                shape = (int(starts[-1]), *states.shape[1:])
                outs.append(_opened(states_part, np.float16, shape))
        outs[0][picked] = logits
        if states is not None:
            ends = np.cumsum([lengths[i] for i in picked])[:-1]
            for i, one in zip(picked, np.split(states, ends), strict=True):
                outs[1][starts[i] : starts[i + 1]] = one
        if number % SAVED_EVERY == 0:
            for out in outs:
                out.flush()
            note.with_suffix(".new").write_text(json.dumps({"done": start + len(picked)}))
            os.replace(note.with_suffix(".new"), note)
    if not outs:
        raise DistillError("cache_teacher: no training rows. Give one at least.")
    for out in outs:
        out.flush()
    del out, outs  # closed before they are renamed
    if reader.layers:
        os.replace(states_part, beside)
    os.replace(part, path)
    note.unlink(missing_ok=True)


def _check(logits: np.ndarray, states: np.ndarray | None, picked: np.ndarray, teacher: str) -> None:
    if logits.ndim != 2:
        raise DistillError(
            f"cache_teacher: {teacher} gives logits {logits.shape} for {len(picked)} rows: only "
            "one vector per row is kept. Set cache_teacher=False."
        )
    if not np.isfinite(logits).all():
        bad = int(picked[~np.isfinite(logits).all(1)][0])
        raise DistillError(
            f"cache_teacher: the teacher's logits of row {bad} are not finite: its training "
            "diverged. Fine-tune it with a lower learning rate."
        )
    if states is not None and not np.isfinite(states).all():
        raise DistillError(
            f"cache_teacher: hidden states of {teacher} are not finite in float16, in which they "
            "are kept. Set cache_teacher=False."
        )


def _opened(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _need_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise DistillError(
            f"cache_teacher: the teacher's hidden states take {wanted / 1e9:.1f} GB, but "
            f"{folder} has {free / 1e9:.1f} GB left. Set cache_teacher=False, or make room."
        )


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def model_digest(model: nn.Module) -> str:
    """A hash of the class, the weights and buffers that are saved, and the configuration."""
    config: Any = model.config
    told = {k: v for k, v in config.to_dict().items() if k not in _NO_MATTER}
    if told.get("problem_type", "") is None:  # what a forward pass with labels makes of it
        one = config.num_labels == 1
        told["problem_type"] = "regression" if one else "single_label_classification"
    seen = hashlib.sha256(f"{type(model).__name__} {json.dumps(told, sort_keys=True)}".encode())
    for name, tensor in model.state_dict().items():
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
