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
    `DistillError` says where they are of something else. What is not told is not compared."""
    path, plain = folder / ASKED, json.loads(json.dumps(told))
    if begun and path.is_file():
        saved = json.loads(path.read_text())
        keys = dict.fromkeys((*plain, *saved))
        other = ", ".join(key for key in keys if saved.get(key) != plain.get(key))
        if other:
            raise DistillError(
                f"{folder}: holds checkpoints of another stage (other {other}), from which this "
                "one would go on. Train in another folder, or delete this one."
            )
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(plain, indent=2))
    os.replace(part, path)
