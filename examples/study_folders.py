"""Where the runs of the GLUE study lie, and that only one process is at work in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import study_settings as settings  # type: ignore[import-not-found]
from filelock import FileLock, Timeout


class Busy(Exception):
    """Another process is at work in this folder; own: on this very run."""

    def __init__(self, folder: Path, *, own: bool) -> None:
        super().__init__(f"{folder} is being worked on by another process")
        self.own = own


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student: all that tells it from the others. kind "teacher" has factor 1 and no tag."""

    task: str
    kind: str
    factor: float = 1.0
    seed: int = 0
    tag: str = settings.MAIN

    def folder(self, output: Path) -> Path:
        if self.kind == "teacher":
            return output / self.task / "teacher"
        return output / self.task / self.tag / f"{self.kind}-{self.factor:g}-seed{self.seed}"

    def rates_folder(self, output: Path) -> Path:
        return output / self.task / self.tag / f"{self.kind}-{self.factor:g}-rates"

    def __str__(self) -> str:
        if self.kind == "teacher":
            return f"{self.task}: teacher"
        tag = "" if self.tag == settings.MAIN else f" [{self.tag}]"
        return f"{self.task}: {self.kind}, factor {self.factor:g}, seed {self.seed}{tag}"


@contextmanager
def locked(folder: Path, *, own: bool) -> Iterator[None]:
    """Only one process is inside at a time; the lock falls when its process ends. Else `Busy`."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Busy(folder, own=own) from error
    try:
        yield
    finally:
        lock.release()
