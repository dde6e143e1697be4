"""Where, when and with what a run of the GLUE study was made; no path of the machine."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers

import kronbert


def provenance(elsewhere: str) -> dict[str, Any]:
    """commit, date, machine, versions. elsewhere: the commit outside of a git checkout."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "commit": commit() or elsewhere,
        "date": datetime.date.today().isoformat(),
        "machine": f"{device}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kronbert": kronbert.__version__,
        },
    }


@lru_cache(maxsize=1)
def commit() -> str:
    """The checkout's commit, "+" after it where files are changed; "" outside of a checkout."""
    found = _git("rev-parse", "HEAD")
    changed = found and _git("status", "--porcelain", "--untracked-files=no")
    return found + ("+" if changed else "")


def _git(*words: str) -> str:
    try:
        run = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return run.stdout.strip()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
