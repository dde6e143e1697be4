"""All results of the GLUE study in one JSON, and the numbers that its tables show."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import study_settings as settings  # type: ignore[import-not-found]

from kronbert.errors import DataError
from kronbert.job_folder import write_whole

RESULT = "result.json"

IDENTITY = ("task", "student", "factor", "seed", "tag")


def collect(sources: list[Path], target: Path) -> dict[str, Any]:
    """Write every result.json below the folders among ``sources`` into one JSON, a line per run;
    returns it. A file among them is such a JSON of earlier: its runs stay, with their teachers, but
    for those that a folder has anew. Teachers are made anew where their folders are gone, so every
    student is held against its own; one that taught none of its task's students goes, but where
    other tasks' teachers go on from it.

    Refused (`DataError`): a run that two folders have with different scores, trials (--limit)
    beside whole runs, a student without its teacher, text that looks like a path of this machine.
    """
    found: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    for path in (one for source in sources if source.is_dir() for one in source.rglob(RESULT)):
        row = json.loads(path.read_text())
        if "student" not in row:
            continue  # a learning rate's short run
        row, key = _kept(row), _key(row)
        if key in found and found[key][1]["scores"] != row["scores"]:
            raise DataError(
                f"{path} and {found[key][0]}: one run with different scores. Collect one."
            )
        found.setdefault(key, (path, row))
    for path in (source for source in sources if source.is_file()):
        before = json.loads(path.read_text())
        for row in (*before["teachers"], *before["runs"]):
            found.setdefault(_key(row), (path, row))
    if not found:
        raise DataError(f"--collect {' '.join(map(str, sources))}: no {RESULT} in there.")
    rows = [found[key][1] for key in sorted(found, key=str)]
    _check(rows)
    runs = [row for row in rows if row["student"] != "teacher"]
    taught = {(row["task"], row["teacher_digest"]) for row in runs}
    gone_on_from = {row["start"] for row in rows if row["student"] == "teacher"}
    tasks = {task for task, _ in taught} - gone_on_from
    teachers = [
        row
        for row in rows
        if row["student"] == "teacher"
        and (row["task"] not in tasks or (row["task"], row["digest"]) in taught)
    ]
    content = {"limit": rows[0]["limit"], "teachers": teachers, "runs": runs}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, _text(content))
    return content


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tells runs apart; of a teacher its weights, too: several may have taught one task."""
    own = row["digest"] if row["student"] == "teacher" else None
    return (*(row.get(name) for name in IDENTITY), own)


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """A result with what determines it, without what it says twice."""
    kept = {key: value for key, value in row.items() if key != "asked"}
    for key in ("model", "limit", "changes"):
        if key in row["asked"]:
            kept[key] = row["asked"][key]
    metric = f"eval_{row['metric']}"
    shown = ("stage", "step", "epoch", metric)
    kept["history"] = [{k: step[k] for k in shown if k in step} for step in row["history"]]
    return kept


def _check(rows: list[dict[str, Any]]) -> None:
    for key in ("limit", "model"):
        found = {str(row[key]) for row in rows}
        if len(found) > 1:
            said = ", ".join(sorted(found))
            raise DataError(f"--collect: runs with --{key} {said} side by side. Collect one kind.")
    digests = {(row["task"], row["digest"]) for row in rows if row["student"] == "teacher"}
    for row in rows:
        who = " ".join(str(row.get(name)) for name in IDENTITY)
        known = row["student"] == "teacher" or (row["task"], row["teacher_digest"]) in digests
        if not known:
            raise DataError(
                f"{who}: distilled from another teacher than those of {row['task']} that were "
                "collected. Remove the run, or collect it with its teacher."
            )
        for text in _texts(row):
            if os.path.isabs(text) or str(Path.home()) in text or str(Path.cwd()) in text:
                raise DataError(f"{who}: {text!r} is a path of this machine.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _text(content: Mapping[str, Any]) -> str:
    """JSON with a run per line, so that a change of one is one line of a diff."""
    parts = [f' "limit": {json.dumps(content["limit"])}']
    for key in ("teachers", "runs"):
        lines = ",\n  ".join(json.dumps(row) for row in content[key])
        parts.append(f' "{key}": [\n  {lines}\n ]' if lines else f' "{key}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds (None: one seed). most: seeds of the task that has the
    most of those that ``mean`` is over."""

    mean: float
    spread: float | None
    seeds: int
    most: int | None = None

    @classmethod
    def over(cls, values: list[float]) -> Spread | None:
        """None for no value: not measured."""
        if not values:
            return None
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def score_of(row: Mapping[str, Any], scores: str = "scores") -> float | None:
    """The task's main metric on the first set of ``scores``; None where it was not measured."""
    if not row.get(scores):
        return None
    return float(next(iter(row[scores].values()))[row["metric"]])


class Results:
    """The numbers of a collected JSON."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content, self.runs = content, content["runs"]
        self.every_teacher = content["teachers"]
        self.teachers = {row["task"]: row for row in self.every_teacher}

    def of(self, kind: str, factor: float, task: str, tag: str) -> dict[int, Mapping[str, Any]]:
        """Seed -> run."""
        wanted = {"student": kind, "factor": factor, "task": task, "tag": tag}
        return {
            row["seed"]: row
            for row in self.runs
            if all(row[key] == value for key, value in wanted.items())
        }

    def scores(
        self, kind: str, factor: float, task: str, tag: str = settings.MAIN, sets: str = "scores"
    ) -> dict[int, float]:
        """Seed -> score."""
        found = self.of(kind, factor, task, tag)
        scored = {seed: score_of(row, sets) for seed, row in found.items()}
        return {seed: score for seed, score in scored.items() if score is not None}

    def teacher(self, task: str, sets: str = "scores") -> Spread | None:
        """Over the task's teachers."""
        rows = [row for row in self.every_teacher if row["task"] == task]
        scores = (score_of(row, sets) for row in rows)
        return Spread.over([score for score in scores if score is not None])

    def retained(
        self, kind: str, factor: float, task: str, tag: str = settings.MAIN, sets: str = "scores"
    ) -> dict[int, float]:
        """Seed -> student / its own teacher."""
        full = {
            row["digest"]: score_of(row, sets) for row in self.every_teacher if row["task"] == task
        }
        found = self.of(kind, factor, task, tag)
        pairs = {s: (score_of(r, sets), full.get(r["teacher_digest"])) for s, r in found.items()}
        return {s: own / of for s, (own, of) in pairs.items() if own is not None and of}

    def retention_error(self, kind: str, factor: float, task: str) -> float | None:
        """Standard error of what main runs keep, for want of more dev rows; mean over the seeds
        that have it. More seeds do not lessen it: all are scored on the same rows."""
        rows = self.of(kind, factor, task, settings.MAIN).values()
        found = [row["retention_error"] for row in rows if row.get("retention_error") is not None]
        return mean(found) if found else None

    def mean_score(self, kind: str, factor: float, tag: str = settings.MAIN) -> Spread | None:
        """Over the five full tasks; None unless all were measured."""
        return _over_tasks([self.scores(kind, factor, task, tag) for task in settings.FULL])

    def mean_retained(self, kind: str, factor: float, tag: str = settings.MAIN) -> Spread | None:
        """The same of student / teacher."""
        return _over_tasks([self.retained(kind, factor, task, tag) for task in settings.FULL])

    def mean_retention_error(self, kind: str, factor: float) -> float | None:
        """Standard error of `mean_retained` for want of more dev rows; None unless all five tasks
        have one."""
        errors = [self.retention_error(kind, factor, task) for task in settings.FULL]
        known = [error for error in errors if error is not None]
        if len(known) < len(errors):
            return None
        return float(sum(error**2 for error in known) ** 0.5 / len(known))

    def factors(self) -> list[float]:
        return sorted({row["factor"] for row in self.runs})

    def parameters(self, kind: str, factor: float, tasks: tuple[str, ...]) -> list[int]:
        """Of the students of these tasks, ascending; heads differ."""
        return sorted(
            {
                row["parameters"]
                for task in tasks
                for row in self.of(kind, factor, task, settings.MAIN).values()
            }
        )


def _over_tasks(tasks: list[dict[int, float]]) -> Spread | None:
    """The mean of the tasks' means. One seed draws other numbers in each task, so their deviations
    are taken as independent; None where a task has one seed."""
    found = [Spread.over(list(task.values())) for task in tasks]
    known = [one for one in found if one is not None]
    if len(known) < len(tasks):
        return None
    spreads = [one.spread for one in known if one.spread is not None]
    spread = sum(one**2 for one in spreads) ** 0.5 / len(tasks)
    seeds = [one.seeds for one in known]
    return Spread(
        mean(one.mean for one in known),
        spread if len(spreads) == len(tasks) else None,
        min(seeds),
        max(seeds),
    )
