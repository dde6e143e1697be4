"""Students that come with kronbert: found by name, in a folder of the user's or in the package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import CheckpointError, near

PREFIX = "kronbert/"
VARIABLE = "KRONBERT_STUDENTS"
PACKAGED = Path(__file__).resolve().parent / "students"


def shipped_path(name: str) -> Path:
    """The folder of a student such as "kronbert/minilm-x8", for any Auto class.

    Looked for in the folder that the environment's KRONBERT_STUDENTS names, then in the package.
    `CheckpointError` lists the names there are; `kronbert.load(name)` asks the hub as well."""
    found = find_shipped(name)
    if found is None:
        raise CheckpointError(f"{name!r}: no student of that name here. {known_students(name)}")
    return found


def find_shipped(name: str | Path) -> Path | None:
    """`shipped_path`, or None: not ours, or not here."""
    if not is_shipped_name(name):
        return None
    short = str(name).removeprefix(PREFIX)
    places = (folder / short for folder in _folders())
    return next((place for place in places if (place / "config.json").is_file()), None)


def is_shipped_name(name: str | Path) -> bool:
    """Whether it reads "kronbert/NAME" and is no model's folder here, which would go first."""
    if not isinstance(name, str) or not name.startswith(PREFIX) or name.count("/") != 1:
        return False
    return name != PREFIX and not Path(name, "config.json").is_file()


def list_students() -> list[dict[str, Any]]:
    """Every student that `shipped_path` finds, by name: name, path, bytes (of the weights), and
    from its report.json teacher, parameters and factor, None where it has none."""
    found: dict[str, dict[str, Any]] = {}
    for folder in _folders():
        for config in sorted(folder.glob("*/config.json")):
            path = config.parent
            name = PREFIX + path.name
            if name not in found:
                report = read_report(path) or {"teacher": {}, "student": {}}
                found[name] = {
                    "name": name,
                    "path": path,
                    "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
                    "teacher": report["teacher"].get("name"),
                    "parameters": report["student"].get("parameters"),
                    "factor": report["student"].get("factor"),
                }
    return [found[name] for name in sorted(found)]


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report.json of a student's folder; None where there is none, or `kronbert report`'s."""
    file = folder / "report.json"
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if "environment" in report:
            return None
        _ = report["student"]["factor"], report["teacher"]["sizes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: not the report of a student ({error}). Copy the folder again."
        ) from error
    return report


def known_students(name: str) -> str:
    """The sentence that lists what there is."""
    known = [student["name"] for student in list_students()]
    if known:
        return near(name, known)
    return f"None is installed: {VARIABLE} may name a folder of them."


def _folders() -> list[Path]:
    named = os.environ.get(VARIABLE)
    return [*([Path(named).expanduser()] if named else []), PACKAGED]
