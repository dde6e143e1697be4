"""What `kronbert compress` is asked for, checked before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from numbers import Integral, Real
from typing import Any

from .config import check_factor
from .errors import PlanError, near


def text_for_paths(settings: Any) -> None:
    """Settings are written as JSON: a `Path` in them becomes text."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, os.PathLike):
            object.__setattr__(settings, field.name, os.fspath(value))


_RATES = (
    *("epochs", "learning_rate", "stage1_epochs", "stage1_learning_rate"),
    *("teacher_epochs", "teacher_learning_rate"),
)
_WHOLE = {
    **dict.fromkeys(("batch_size", "max_length", "limit", "words", "stage1_words"), 1),
    **dict.fromkeys(("valid_blocks", "layers"), 1),
    **dict.fromkeys(("splice", "augment", "seed"), 0),
}
_MOST = {"seed": 2**32 - 1}
"""Settings that are whole numbers: the least and the most that each can be."""


def check_numbers(settings: Any, command: str) -> None:
    """Raise `PlanError` for a seed, a rate or a count that no training can have; whole numbers of
    other libraries become Python's, which JSON knows."""
    for field in fields(settings):
        key, value = field.name, getattr(settings, field.name)
        if value is None or key not in (*_RATES, *_WHOLE):
            continue
        known = isinstance(value, Real) and not isinstance(value, bool)
        if key in _RATES:
            if not (known and 0 < value < inf):
                raise PlanError(f"{command}({key}={value!r}): expected a number > 0.")
            continue
        least, most = _WHOLE[key], _MOST.get(key, inf)
        if not (known and isinstance(value, Integral) and least <= int(value) <= most):
            expected = f"{least} or more" if most == inf else f"{least} to {most}"
            raise PlanError(f"{command}({key}={value!r}): expected {expected}.")
        object.__setattr__(settings, key, int(value))


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """What `kronbert compress` is asked for.

    model: hub name or folder, with a task head fine-tuned for the task or without one. task: a GLUE
    name or a folder of tables. factor or preset: as in `kronbert.convert`. None: the value of the
    recipe (factor: `kronbert.distill.recipes.kronbert`; preset: KroneckerBERT's), or, for the
    teacher, 1e-4 below 512 hidden units and 3e-5 from there on.
    regression: whether a folder's labels are scores; None: as a fine-tuned teacher's head says,
    else where they are numbers written with a point.
    layers: how many of the teacher's the student has, as `kronbert.fewer_layers` takes it; factor
    counts against the teacher all the same. None: all.
    epochs: of stage 2's steps together; learning_rate: of their first; the others keep their share.
    student: what stage 2 starts from, see `job_start.find_start`; stage1_text= is instead of it.
    None: the nearer of a shipped one and of the teacher's own layers, fitted to its rows.
    Rows without labels that stage 2 reads beside the training rows: splice: rows made of two
    training rows, None: as many as the recipe wants; reword: the share of their words that become
    others, None: none, see `kronbert.distill.splice`; augment: copies of every training row with
    words replaced; unlabelled: text of the task's kind, as `kronbert.distill.unlabelled_text` takes
    it. cache_teacher: the teacher reads stage 2's rows once, for all passes; what it gives lies
    below ``output`` meanwhile, see `kronbert.distill.Stage`."""

    model: str
    task: str
    output: str
    factor: float | None = None
    preset: str | None = None
    layers: int | None = None
    data_dir: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    regression: bool | None = None
    stage1_text: str | None = None
    stage1_words: int | None = None
    stage1_epochs: float | None = None
    stage1_learning_rate: float | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    student: str | None = None
    splice: int | None = None
    reword: float | None = None
    augment: int = 0
    unlabelled: str | None = None
    cache_teacher: bool = False
    teacher_epochs: float = 3
    teacher_learning_rate: float | None = None
    precision: str = "auto"
    limit: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        text_for_paths(self)
        check_numbers(self, "compress")
        if (self.factor is None) == (self.preset is None):
            raise PlanError("compress: expected factor= or preset=, one of them. Try --factor 8.")
        if self.factor is not None:
            check_factor(self.factor, "compress")
        if self.stage1_text is None:
            for key in ("stage1_words", "stage1_epochs", "stage1_learning_rate"):
                if getattr(self, key) is not None:
                    raise PlanError(f"compress: {key}= without stage1_text=, the text to learn.")
        elif self.student not in (None, "none"):
            raise PlanError(
                "compress: student= and stage1_text=: a student has learnt general text already. "
                "Give one of the two."
            )
        if not 0 <= (self.reword or 0) < 1:
            raise PlanError(f"compress(reword={self.reword}): expected 0 or more, below 1.")
        if self.reword and self.splice == 0:
            raise PlanError("compress: reword= without splices, whose words it changes: splice=0.")
        more = (self.splice, self.reword, self.augment, self.unlabelled)
        if self.preset is not None and any(more):
            raise PlanError(
                "compress: splice=, reword=, augment= and unlabelled= give rows without labels, "
                "from which KroneckerBERT's recipe, that of preset=, cannot learn. Give factor= "
                "instead."
            )
        if self.text_columns is not None:
            object.__setattr__(self, "text_columns", tuple(self.text_columns))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompressSettings:
        known = tuple(field.name for field in fields(cls))
        for key in data:
            if key not in known:
                raise PlanError(f"compress settings: unknown key {key!r}. {near(key, known)}")
        return cls(**data)
