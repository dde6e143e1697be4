"""The JSON file of a benchmark: sections of cases, each written when done, resumed after a stop."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .errors import ReportError
from .job_folder import write_whole
from .latency import Timing, environment, paired_ratio

Case = tuple[str, Callable[[], dict[str, Any]]]
"""A case's name within its section, and what measures it: the row, ready for JSON."""

Say = Callable[[str], None]

SCHEMA = 1

TIME_IS_UP = "not measured: the time limit came first"


class Results:
    """Sections of measured rows in one JSON file.

    ``{"schema", "command", "quick", "sections": {name: {"environment", "rows": {case: row}}}}``. A
    row says at which commit and on which day it was measured; one that failed holds its ``error``
    and is tried again by the next run, one that is there is not measured again. file: read when it
    exists. Raises `ReportError` for one that is no such file, or mixes quick and full rows."""

    def __init__(
        self,
        file: Path,
        *,
        command: str,
        device: str = "cpu",
        quick: bool = False,
        commit: str | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.file, self.clock = file, clock
        self.commit = commit or current_commit()
        self.environment = environment(nn.Linear(1, 1, device=device))
        self.content: dict[str, Any] = {"schema": SCHEMA, "quick": quick, "sections": {}}
        if file.is_file():
            self.content = read(file)
            if self.content["quick"] != quick:
                kind = "quick" if self.content["quick"] else "full"
                raise ReportError(
                    f"{file} holds {kind} measurements, these are not. Choose another --out."
                )
        self.content["command"] = command

    def section(
        self,
        name: str,
        cases: Iterable[Case],
        *,
        deadline: float | None = None,
        say: Say = print,
    ) -> None:
        """Measure the cases that have no row yet; the file is written after each of them.

        A case that raises is recorded as its error, and the rest goes on. deadline: on this
        object's clock; the cases it leaves out are recorded as such."""
        section = self.content["sections"].setdefault(name, {"environment": {}, "rows": {}})
        rows: dict[str, Any] = section["rows"]
        for case, measure in cases:
            if case in rows and "error" not in rows[case]:
                continue
            start = self.clock()
            if deadline is not None and start >= deadline:
                rows[case] = {"error": TIME_IS_UP}
                say(f"{name}: {case}: {TIME_IS_UP}")
                self.write()
                continue
            try:
                row = measure()
            except Exception as error:  # a benchmark's other rows must survive any one of them
                row = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            row["commit"], row["date"] = self.commit, _today()
            rows[case] = row
            section["environment"] = self.environment
            self.write()
            say(f"{name}: {case}: {brief(row)} [{self.clock() - start:.1f} s]")

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")


def read(file: Path) -> dict[str, Any]:
    """The content of such a file; `ReportError` when it is something else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{file}: expected the JSON of a benchmark, got {error}.") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ReportError(
            f"{file}: expected the JSON of a benchmark (schema {SCHEMA}). Choose another --out."
        )
    return content


def timed_row(
    timings: Mapping[str, Timing], first: str, *, over: Iterable[str] | None = None
) -> dict[str, Any]:
    """A row: milliseconds of each, and how many times faster each ``over`` is than ``first``.

    first: the one everything is compared with, e.g. the dense model; over: all others by default.
    Ratios are medians over pairs of one round, `kronbert.latency.paired_ratio`."""
    others = [name for name in (timings if over is None else over) if name != first]
    return {
        "ms": {name: _rounded(timing.to_json()) for name, timing in timings.items()},
        "rounds": len(timings[first].samples_ms),
        "ratio": {name: round(paired_ratio(timings[first], timings[name]), 4) for name in others},
    }


def brief(row: Mapping[str, Any]) -> str:
    """A row in one line: its ratios, or what went wrong."""
    if "error" in row:
        return str(row["error"]).splitlines()[0][:160]
    if "ratio" in row:
        return ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratio"].items())
    plain = (f"{key} {value}" for key, value in row.items() if isinstance(value, int | float | str))
    return ", ".join(plain)[:160]


def current_commit() -> str:
    """The checkout's commit, with " + changes" when files differ from it; "unknown" outside git."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        try:
            run = subprocess.run(["git", *words], capture_output=True, text=True, cwd=here)
        except OSError:
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    commit = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return (commit + (" + changes" if changed else "")) if commit else "unknown"


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Five digits: beyond them is noise, and a diff of the file stays readable."""
    return {key: float(f"{value:.5g}") for key, value in values.items()}


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
