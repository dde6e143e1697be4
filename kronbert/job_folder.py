"""The output folder of a job: its settings and finished steps, whole at every moment."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import CheckpointError
from .job_places import changed_settings, places_of

Say = Callable[[str], None]

BYTES_PER_PARAMETER = 40
"""float32 with Adam's two moments, three checkpoints at the moment one is replaced, one result."""

OWN = (
    *("teacher", "stage1", "start", "intermediate", "student", "teacher-outputs", "*-run"),
    *("report.json", "report.md", "curve.json", "curve.png"),
)
"""Patterns of what a job writes, or removes, in its folder; pictures of a report aside."""


class JobFolder:
    """``state.json`` (settings, where their paths led, data, finished steps) and the models in one
    output folder.

    Every file is replaced as a whole, so a killed run leaves either the state before a step or the
    one after it. Raises `CheckpointError` for a folder that cannot be written, or that holds
    something else: a run with other settings, or models of another origin."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any], say: Say) -> None:
        self.path, self.say = Path(path), say
        writable(self.path)
        self.file = self.path / "state.json"
        asked = json.loads(json.dumps(settings))
        places = places_of(asked)
        self.state: dict[str, Any] = {"settings": asked, "data": None, "steps": {}}
        if self.file.is_file():
            self.state = self._before(asked, places)
        else:
            foreign = [one.name for pattern in OWN for one in sorted(self.path.glob(pattern))]
            if foreign:
                raise CheckpointError(
                    f"{self.path}: holds {', '.join(foreign)}, but no state.json of a run that "
                    "could be resumed. Nothing is overwritten: choose another --output."
                )
        self.state["places"] = self.state.get("places", {}) | places

    def _before(self, asked: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self.file.read_text())
            before = state["settings"]
            _ = state["steps"], state["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.file}: not the state of a run ({error}). Choose another --output, or "
                "remove the folder to start again."
            ) from error
        changed = changed_settings(before, asked, state.get("places"), places)
        if changed:
            raise CheckpointError(
                f"{self.path}: holds a run with other settings ({', '.join(changed)}). Use the "
                "same settings to resume it, or another --output."
            )
        return state

    def begin(self, data: str, digest: str, texts: Mapping[str, str] | None = None) -> None:
        """Write the state before anything is trained. data: what the rows are and how many; digest:
        of their contents. texts: of files beside them, by name; None where none is read again."""
        before = self.state["data"]
        if before not in (None, data):
            raise CheckpointError(
                f"{self.path}: began with the data {before!r}, which is {data!r} now. "
                "Restore the data to resume, or choose another --output."
            )
        if self.state.get("digest") not in (None, digest):
            raise CheckpointError(
                f"{self.path}: began with the data {before!r}, whose contents are others now. "
                "Restore the data to resume, or choose another --output."
            )
        known = self.state.get("texts") or {}
        for name, found in (texts or {}).items():
            if known.get(name, found) != found:
                raise CheckpointError(
                    f"{self.path}: began with another text in {name}. Restore it to resume, or "
                    "choose another --output."
                )
        self.state |= {"data": data, "digest": digest, "texts": known | dict(texts or {})}
        self._write()

    def began(self) -> bool:
        """Whether `begin` was called, in this process or in an interrupted one."""
        return self.state["data"] is not None

    def _write(self) -> None:
        write_whole(self.file, json.dumps(self.state, indent=1) + "\n")

    def done(self, *steps: str) -> bool:
        return all(name in self.state["steps"] for name in steps)

    def whole(self, model: str) -> bool:
        """Whether the model of that name is still there."""
        return (self.path / model / "config.json").is_file()

    def need(self, model: str) -> None:
        """Raise `CheckpointError` where a model that the run has made was removed since."""
        if not self.whole(model):
            raise CheckpointError(
                f"{self.path}: {model}/, which this run made, is gone. Restore it, or remove the "
                "whole folder to start again."
            )

    def forget(self, name: str) -> None:
        """A step whose files are gone is to be done again."""
        self.state["steps"].pop(name, None)

    def step(self, name: str, what: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step: run now, or kept from before the interruption.

        Its checkpoints, in the folder `run_of` names, are removed after the result is recorded."""
        if self.done(name):
            self.say(f"{what}: done before")
        else:
            self.say(what)
            start = time.monotonic()
            result = run()
            result["seconds"] = round(time.monotonic() - start, 1)
            self.state["steps"][name] = result
            self._write()
        shutil.rmtree(self.run_of(name), ignore_errors=True)
        found: dict[str, Any] = self.state["steps"][name]
        return found

    def run_of(self, step: str) -> Path:
        """Where the checkpoints of a step lie while it runs."""
        return self.path / f"{step}-run"

    def need_space(self, parameters: int) -> None:
        """Raise `CheckpointError` unless a training of so many parameters fits on the disk."""
        free = shutil.disk_usage(self.path).free
        needed = BYTES_PER_PARAMETER * parameters
        if free < needed:
            raise CheckpointError(
                f"{self.path}: {free / 2**20:,.0f} MiB free, about {needed / 2**20:,.0f} MiB "
                "needed for checkpoints. Free some space or choose another --output."
            )

    def save_model(self, model: Any, tokenizer: Any, name: str, **how: Any) -> None:
        """``name/`` as a whole or not at all; how: more for `save_pretrained`."""
        scratch, final = self.path / f".{name}.part", self.path / name
        shutil.rmtree(scratch, ignore_errors=True)
        model.save_pretrained(scratch, **how)
        tokenizer.save_pretrained(scratch)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(scratch, final)


@contextmanager
def alone(folder: str | Path) -> Iterator[None]:
    """No other process is at work in ``folder`` meanwhile, or `CheckpointError` at once. The lock
    falls when its process ends, however it ends."""
    writable(folder)
    lock = FileLock(Path(folder, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{folder}: another process is at work in it. Wait for its end, or choose another "
            "--output."
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_whole(file: Path, text: str) -> None:
    """The file with its new content, or, after a kill at any moment, with its old one."""
    scratch = file.with_name(f".{file.name}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def writable(folder: str | Path) -> None:
    """Make ``folder`` if need be; `CheckpointError` where it cannot be written."""
    folder = Path(folder)
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("full disks refuse this line, not the empty file\n")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror}). Choose another --output."
        ) from error
