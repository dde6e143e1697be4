"""What a task is: columns, labels in their official order, metrics; and the nine of GLUE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk
from transformers import EvalPrediction

from kronbert.errors import DataError, near

GLUE_HUB = "nyu-mll/glue"


def _correlation(measure: Callable[[Any, Any], Any]) -> Callable[[Any, Any], float]:
    def score(gold: np.ndarray, predicted: np.ndarray) -> float:
        # A correlation with a constant is 0/0: it predicts nothing, so it scores nothing.
        if np.ptp(gold) == 0 or np.ptp(predicted) == 0:
            return 0.0
        return float(measure(gold, predicted)[0])

    return score


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": sk.accuracy_score,
    "f1": lambda gold, predicted: sk.f1_score(gold, predicted, zero_division=0.0),
    "macro_f1": lambda gold, predicted: sk.f1_score(
        gold, predicted, average="macro", zero_division=0.0
    ),
    "matthews": sk.matthews_corrcoef,
    "spearman": _correlation(stats.spearmanr),
    "pearson": _correlation(stats.pearsonr),
}
REGRESSION_METRICS = ("spearman", "pearson")


@dataclass(frozen=True, kw_only=True)
class Task:
    """text: one or two column names. labels: names in class order, None for regression.
    metrics: keys of `METRICS`, of which ``primary`` is the one that ranks models.
    splits: names of the dev sets, the one that ranks models first.
    label_aliases: other names that the ``label`` column has in files.
    indices: whether a file may give the class index in place of the name.
    hub, hub_config: arguments of `datasets.load_dataset`."""

    name: str
    text: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    primary: str = "accuracy"
    max_length: int = 128
    splits: tuple[str, ...] = ("validation",)
    label_aliases: tuple[str, ...] = ()
    indices: bool = True
    hub: str | None = None
    hub_config: str | None = None

    def __post_init__(self) -> None:
        where = f"Task({self.name!r})"
        if isinstance(self.text, list):
            object.__setattr__(self, "text", tuple(self.text))
        if not (1 <= len(self.text) <= 2 and len(set(self.text)) == len(self.text)):
            raise DataError(f"{where}: text={self.text!r}: expected one or two column names.")
        if self.label in self.text:
            raise DataError(f"{where}: column {self.label!r} is both text and label.")
        if self.labels is not None and not len(set(self.labels)) == len(self.labels) >= 2:
            raise DataError(
                f"{where}: labels={self.labels!r}: expected two or more different names, "
                "or None for regression."
            )
        for key in (*self.metrics, self.primary):
            if key not in METRICS:
                raise DataError(f"{where}: unknown metric {key!r}. {near(key, tuple(METRICS))}")
            if (key in REGRESSION_METRICS) != (self.labels is None):
                kind = "regression" if self.labels is None else "classification"
                raise DataError(f"{where}: {key!r} does not measure {kind}.")
        if self.primary not in self.metrics:
            raise DataError(f"{where}: primary={self.primary!r} is not in metrics={self.metrics}.")
        if not self.splits:
            raise DataError(f"{where}: splits is empty: expected at least one dev set.")
        if self.max_length < 8:
            raise DataError(f"{where}: max_length={self.max_length}: expected tokens, 8 or more.")

    @property
    def num_labels(self) -> int:
        """Width of the task head: 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """The inverse of `to_dict`, also after JSON; unknown keys are refused."""
        known = tuple(f.name for f in fields(cls))
        for key in values:
            if key not in known:
                raise DataError(f"Task.from_dict: unknown key {key!r}. {near(key, known)}")
        tuples: dict[str, Any] = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return cls(**values | tuples)

    def encode(self, value: Any) -> int | float | None:
        """Class index, or the score of a regression; None where ``value`` is no label of this task.

        A name wins over an index that reads the same.
        """
        text = str(value).strip()
        if self.labels is not None:
            if text in self.labels:
                return self.labels.index(text)
            whole = text.removesuffix(".0")  # pandas makes floats of whole numbers beside a gap
            if whole in self.labels:
                return self.labels.index(whole)
            index = self.indices and whole.isascii() and whole.isdigit()
            return int(whole) if index and int(whole) < len(self.labels) else None
        try:
            score = float(text)
        except ValueError:
            return None
        return score if math.isfinite(score) else None


_ENTAILMENT = ("entailment", "not_entailment")


def _glue(name: str, text: tuple[str, ...], labels: tuple[str, ...] | None, **more: Any) -> Task:
    return Task(name=name, text=text, labels=labels, hub=GLUE_HUB, hub_config=name, **more)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"),
              metrics=("matthews",), primary="matthews"),
        _glue("sst2", ("sentence",), ("negative", "positive")),
        _glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"),
              metrics=("f1", "accuracy"), primary="f1"),
        _glue("stsb", ("sentence1", "sentence2"), None, label_aliases=("score",),
              metrics=("spearman", "pearson"), primary="spearman"),
        _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"),
              metrics=("f1", "accuracy"), primary="f1", label_aliases=("is_duplicate",)),
        _glue("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
              splits=("validation_matched", "validation_mismatched"),
              label_aliases=("gold_label",)),
        _glue("qnli", ("question", "sentence"), _ENTAILMENT),
        _glue("rte", ("sentence1", "sentence2"), _ENTAILMENT),
        _glue("wnli", ("sentence1", "sentence2"), _ENTAILMENT[::-1]),
    )
}  # fmt: skip


def plain_name(name: str) -> str:
    """A GLUE name as the keys of `TASKS` are written: SST-2 and sst_2 are sst2."""
    return name.lower().replace("-", "").replace("_", "")


def get_task(name: str) -> Task:
    """The GLUE task ``name``; spellings such as ``SST-2`` and ``STS_B`` are accepted."""
    key = plain_name(name)
    if key not in TASKS:
        raise DataError(
            f"unknown task {name!r}: expected one of GLUE's ({', '.join(TASKS)}) or a folder with "
            f"train.* and dev.* files. {near(key, tuple(TASKS))}"
        )
    return TASKS[key]


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """The task's metrics for `transformers.Trainer`: fractions, not percent.

    Every metric is NaN where a logit is not finite: a diverged model has no score.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        if not np.isfinite(_logits(prediction)).all():
            return dict.fromkeys(task.metrics, math.nan)
        found = predicted(task, prediction)
        return {key: float(METRICS[key](prediction.label_ids, found)) for key in task.metrics}

    return compute


def predicted(task: Task, prediction: EvalPrediction) -> Any:
    """Logits (rows, labels) -> the class of each row, or its number where the task has none."""
    logits = _logits(prediction)
    return logits.reshape(len(logits)) if task.labels is None else logits.argmax(axis=-1)


def _logits(prediction: EvalPrediction) -> Any:
    outputs = prediction.predictions
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64)
