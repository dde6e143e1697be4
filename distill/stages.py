"""One training phase as data: what is learnt, for how long, and with which optimiser."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kronbert.distill.numbers import is_number, plain
from kronbert.distill.objectives import Objective, known_keys
from kronbert.distill.pieces import check_pieces
from kronbert.errors import DistillError

if TYPE_CHECKING:
    from kronbert.distill.trainer import DistillArguments


CACHED = frozenset({"embedding", "ffn", "logits"})
"""Taps of a teacher that can be kept on disk; scores grow with the square of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """batch_size: examples per optimiser step, over all processes and accumulated batches.
    max_length: tokens per example, for whoever tokenizes. warmup_ratio: a share of the steps.
    scheduler: a name transformers knows. seed: of shuffling and dropout. dropout: the student's
    probability during the stage; None: the model's own.

    ema: in (0, 1), the share of the old average that an exponential moving average of the trained
    weights keeps per step (less in the first steps, `averaging.decay_at`); evaluations during the
    stage, and the student it leaves, have the averaged weights. None: no average.
    small_rate, embedding_rate: what the learning rate is multiplied by for the smaller matrix of a
    Kronecker pair, and for embedding tables: see `rates.rate_factors`.
    muon_rate: the matrices of Kronecker layers take Muon's steps, at learning_rate times this
    number; all else AdamW's. None: AdamW's everywhere. See `muon.Muon`.
    pieces: lengths of which each step of general text takes one, to cut its blocks of max_length
    tokens into; see `pieces.Pieces`. Empty: whole blocks. Task rows have their own lengths.
    cache_teacher: what the objective needs of the teacher, logits and hidden states but no scores,
    is computed once for all rows of a task and kept on disk: hidden states in float16, gigabytes
    for a million tokens. See `teacher_cache`."""

    name: str
    objective: Objective
    learning_rate: float
    epochs: float
    batch_size: int = 32
    max_length: int = 128
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    scheduler: str = "linear"
    max_grad_norm: float = 1.0
    seed: int = 42
    dropout: float | None = None
    ema: float | None = None
    small_rate: float = 1.0
    embedding_rate: float = 1.0
    muon_rate: float | None = None
    pieces: tuple[int, ...] = ()
    cache_teacher: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise DistillError(f"Stage(name={self.name!r}): expected a name that can be a folder.")
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for key in ("learning_rate", "epochs", "max_grad_norm"):
            value = getattr(self, key)
            if not (is_number(value) and 0 < value < inf):
                raise DistillError(f"Stage({self.name!r}, {key}={value!r}): expected a number > 0.")
        for key in ("batch_size", "max_length"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise DistillError(
                    f"Stage({self.name!r}, {key}={value!r}): expected a whole number >= 1."
                )
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise DistillError(
                f"Stage({self.name!r}, seed={self.seed!r}): expected a whole number in [0, 2**32)."
            )
        if not (is_number(self.warmup_ratio) and 0 <= self.warmup_ratio < 1):
            raise DistillError(
                f"Stage({self.name!r}, warmup_ratio={self.warmup_ratio!r}): expected a share of "
                "the steps in [0, 1)."
            )
        if not (is_number(self.weight_decay) and 0 <= self.weight_decay < inf):
            raise DistillError(
                f"Stage({self.name!r}, weight_decay={self.weight_decay!r}): expected >= 0."
            )
        kinds = {"objective": Objective, "scheduler": str, "pieces": Iterable,
                 "cache_teacher": bool}  # fmt: skip
        for key, kind in kinds.items():
            if not isinstance(getattr(self, key), kind):
                raise DistillError(
                    f"Stage({self.name!r}, {key}={getattr(self, key)!r}): expected "
                    f"{'lengths' if key == 'pieces' else kind.__name__}."
                )
        object.__setattr__(self, "pieces", tuple(map(plain, self.pieces)))
        check_pieces(f"Stage({self.name!r})", self.pieces, self.max_length)
        check_switches(f"Stage({self.name!r})", self)
        if self.cache_teacher and self.pieces:
            raise DistillError(
                f"Stage({self.name!r}): cache_teacher and pieces: what the teacher gives for whole "
                "blocks is not what it gives for pieces. Leave one out."
            )
        needed = self.objective.teacher_taps
        if self.cache_teacher and not (needed and needed <= CACHED):
            raise DistillError(
                f"Stage({self.name!r}, cache_teacher=True): only the teacher's "
                f"{', '.join(sorted(CACHED))} are kept, but the objective needs "
                f"{', '.join(sorted(needed)) or 'nothing'} of it. Set cache_teacher=False, or "
                "drop the other terms."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self) | {"objective": self.objective.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stage:
        """The inverse of `to_dict`; unknown keys are refused."""
        given = dict(known_keys(cls, data))
        return cls(**given | {"objective": Objective.from_dict(given["objective"])})

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Stage:
        """The inverse of `to_json`."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise DistillError(
                f"Stage.from_json: no JSON ({error}). Give what to_json gives."
            ) from error

    def to_arguments(self, output_dir: str | Path, **overrides: Any) -> DistillArguments:
        """The stage as `DistillArguments`; overrides are its fields and win.

        The batch of one process is batch_size / (WORLD_SIZE * gradient_accumulation_steps), so a
        recipe trains the same on one process or eight; `DistillError` if that is no whole number,
        and for a switch that only `run_stage` has: cache_teacher, pieces.
        """
        from kronbert.distill.trainer import DistillArguments

        for key in ("cache_teacher", "pieces"):
            if value := getattr(self, key):
                raise DistillError(
                    f"Stage({self.name!r}, {key}={value!r}): training arguments have no "
                    "such switch. Use kronbert.distill.finetune.run_stage, or leave it out."
                )
        given: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            # transformers reads a number below 1 as a share of the steps
            "warmup_steps": self.warmup_ratio,
            "weight_decay": self.weight_decay,
            "lr_scheduler_type": self.scheduler,
            "max_grad_norm": self.max_grad_norm,
            "seed": self.seed,
            "ema": self.ema,
            "small_rate": self.small_rate,
            "embedding_rate": self.embedding_rate,
            "muon_rate": self.muon_rate,
            "dropout": self.dropout,
        }
        if "per_device_train_batch_size" not in overrides:
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            parts = processes * overrides.get("gradient_accumulation_steps", 1)
            if self.batch_size % parts:
                raise DistillError(
                    f"Stage({self.name!r}, batch_size={self.batch_size}) does not divide among "
                    f"{parts} processes times accumulated batches. Pass "
                    "per_device_train_batch_size, or a batch_size that is a multiple."
                )
            given["per_device_train_batch_size"] = self.batch_size // parts
        try:
            return DistillArguments(output_dir=str(output_dir), **given | overrides)
        except TypeError as error:
            raise DistillError(f"Stage({self.name!r}).to_arguments: {error}.") from error


def check_switches(where: str, told: Stage | DistillArguments) -> None:
    """Raise `DistillError` if a switch of a stage, or of its arguments, has no meaning."""
    ema = told.ema
    if ema is not None and not (is_number(ema) and 0 < ema < 1):
        raise DistillError(
            f"{where}: ema={ema!r}: expected a share in (0, 1), 0.999 for an average over about "
            "1,000 steps, or None."
        )
    if told.dropout is not None and not (is_number(told.dropout) and 0 <= told.dropout < 1):
        raise DistillError(
            f"{where}: dropout={told.dropout!r}: expected a probability in [0, 1), or None for the "
            "model's own."
        )
    for key in ("small_rate", "embedding_rate", "muon_rate"):
        rate = getattr(told, key)
        if key == "muon_rate" and rate is None:
            continue
        if not (is_number(rate) and 0 < rate < inf):
            raise DistillError(
                f"{where}: {key}={rate!r}: expected a number > 0, by which the learning rate is "
                "multiplied."
            )
