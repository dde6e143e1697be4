"""What a folder's checkpoints are of: a stage goes on from its own alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kronbert.errors import DistillError

ASKED = "asked.json"


def claim(folder: Path, told: Mapping[str, Any], *, begun: bool) -> None:
    """Note in ``folder`` what is trained there; begun: it has checkpoints already, and
    `DistillError` says where they are of something else."""
    path = folder / ASKED
    if begun and path.is_file() and (other := differing(json.loads(path.read_text()), told)):
        raise DistillError(
            f"{folder}: holds checkpoints of another stage (other {other}), from which this one "
            "would go on. Train in another folder, or delete this one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write(path, told)


def noted(folder: Path, key: str) -> Any:
    """What was told of ``key`` for the checkpoints in ``folder``; None where nothing was."""
    path = folder / ASKED
    return json.loads(path.read_text()).get(key) if path.is_file() else None


def differing(saved: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """The keys, in a line, whose values are not what JSON keeps of those in ``told``."""
    plain = json.loads(json.dumps(told))
    keys = dict.fromkeys((*plain, *saved))
    return ", ".join(key for key in keys if saved.get(key) != plain.get(key))


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=2))
    os.replace(part, path)
