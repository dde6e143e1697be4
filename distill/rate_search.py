"""Which learning rate a stage should have: a short run of each, scored on the dev set."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from torch import nn

from kronbert.distill.begun import ASKED, differing, write
from kronbert.distill.data import TaskData
from kronbert.distill.digests import data_digest
from kronbert.distill.finetune import CACHE, evaluate, run_stage
from kronbert.distill.stages import Stage
from kronbert.distill.teacher_cache import model_digest
from kronbert.errors import DistillError

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class RateResult:
    """One learning rate's score: the task's primary metric, mean over its dev sets; None where the
    student diverged. seconds: of training and scoring."""

    learning_rate: float
    score: float | None
    seconds: float


HARMLESS = ("precision", "cache", "checkpoints", "held_out", "keep_last", "say")
"""Options of `run_stage` that change no score, and precision, which is told by itself."""


@dataclass(frozen=True, kw_only=True)
class RateSearch:
    """Every rate's result, lowest rate first, and the chosen rate."""

    metric: str
    results: tuple[RateResult, ...]
    learning_rate: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self) | {"results": [asdict(result) for result in self.results]}

    def __str__(self) -> str:
        lines = [f"learning rate  {self.metric:>10}  seconds"]
        for result in self.results:
            score = "diverged" if result.score is None else f"{result.score:.4f}"
            mark = "  <- chosen" if result.learning_rate == self.learning_rate else ""
            lines.append(f"{result.learning_rate:13.3g}  {score:>10}  {result.seconds:7.1f}{mark}")
        return "\n".join(lines)


def search_rates(
    student: nn.Module,
    teacher: nn.Module | None,
    stage: Stage,
    data: TaskData,
    folder: str | Path,
    rates: Sequence[float],
    *,
    tokenizer: Any,
    share: float = 0.25,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> RateSearch:
    """Train a copy of ``student`` through ``stage`` with each of ``rates``, for a ``share`` of its
    epochs, the schedule shortened with them; the best dev score wins, of equals the lower rate.

    data: tokenised. folder: one folder per rate, which keeps its result, so that an interrupted
    search goes on where it was; another stage, student, share, precision, option or data are
    refused.
    options: more of `run_stage` (precision, cache, ...). ``student`` stays as it is, and as every
    rate starts from it with the stage's seed, the result is the same each time. The chosen rate has
    seen the dev set: a score on the same dev set is a little flattered. Raises `DistillError` if
    every rate diverged."""
    folder = Path(folder)
    if not rates or len(set(rates)) < len(rates):
        raise DistillError(
            f"search_rates(rates={list(rates)}): expected different rates, one or more."
        )
    if not 0 < share <= 1:
        raise DistillError(f"search_rates(share={share!r}): expected a share in (0, 1].")
    stages = [
        replace(stage, learning_rate=rate, epochs=stage.epochs * share) for rate in sorted(rates)
    ]
    start = {
        "student": model_digest(student),
        "data": f"{data.source}; {data_digest(data)}",
        "metric": data.task.primary,
        "precision": options.get("precision", "auto"),
    }
    if more := {name: value for name, value in options.items() if name not in HARMLESS}:
        start["options"] = repr(sorted(more.items()))
    if teacher is not None:
        start["teacher"] = model_digest(teacher)
    results = []
    for short in stages:
        place = folder / f"rate-{short.learning_rate:g}"
        told = {"stage": short.to_dict(), **start}
        result = _read(place / RESULT, told)
        _read(place / ASKED, told)  # of a search that was interrupted
        if result is None:
            if say is not None:
                say(f"learning rate {short.learning_rate:g}: {short.epochs:g} epochs")
            place.mkdir(parents=True, exist_ok=True)
            write(place / ASKED, {"of": told, "result": None})
            began, model = monotonic(), copy.deepcopy(student)
            given: dict[str, Any] = {"cache": folder / CACHE, "keep_last": True, "say": say}
            run_stage(
                model,
                teacher,
                short,
                data,
                place / "run",
                tokenizer=tokenizer,
                **given | options,
            )
            score = _score(model, data, tokenizer)
            result = RateResult(
                learning_rate=short.learning_rate,
                score=score,
                seconds=round(monotonic() - began, 1),
            )
            write(place / RESULT, {"of": told, "result": asdict(result)})
            (place / ASKED).unlink()
            shutil.rmtree(place / "run", ignore_errors=True)  # the checkpoint has done its duty
        if say is not None:
            told_score = "diverged" if result.score is None else f"{result.score:.4f}"
            say(f"learning rate {result.learning_rate:g}: {data.task.primary} {told_score}")
        results.append(result)
    return RateSearch(
        metric=data.task.primary, results=tuple(results), learning_rate=_best(results)
    )


def _best(results: Sequence[RateResult]) -> float:
    """The rate of the highest score, the lowest of equals; results are sorted by rate."""
    sound = [result for result in results if result.score is not None]
    if not sound:
        tried = ", ".join(f"{result.learning_rate:g}" for result in results)
        raise DistillError(f"search_rates: every rate diverged ({tried}). Search lower ones.")
    return max(sound, key=lambda result: result.score or 0.0).learning_rate


def _score(model: nn.Module, data: TaskData, tokenizer: Any) -> float | None:
    scores = evaluate(model, data, tokenizer).values()
    mean = sum(score[data.task.primary] for score in scores) / len(scores)
    return None if math.isnan(mean) else mean


def _read(path: Path, told: dict[str, Any]) -> RateResult | None:
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    if other := differing(saved["of"], told):
        raise DistillError(
            f"{path}: the result of another search (other {other}). Search in another folder, or "
            "delete this one."
        )
    return RateResult(**saved["result"]) if saved["result"] else None
