"""The checkpoints of a stage's folder: which are whole, and their removal by one process."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer

from kronbert.distill.averaging import has_average


def last_checkpoint(folder: str | Path, *, averaged: bool = False) -> Path | None:
    """The newest whole checkpoint in ``folder``; one cut off in the writing is passed over.

    averaged: of a stage with ``ema``: without the average a checkpoint is not whole."""
    found = reversed(all_checkpoints(folder))
    return next((path for path in found if _whole(path, averaged)), None)


def all_checkpoints(folder: str | Path) -> list[Path]:
    """Oldest first."""
    found = (path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps before it."""
    return int(checkpoint.name[11:])


def remove(paths: Sequence[Path], trainer: Trainer) -> None:
    """Delete files and folders once every process of ``trainer`` is here: the one that saves
    does it, and the others wait for it."""
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def _whole(checkpoint: Path, averaged: bool) -> bool:
    """Whether every file that a resumed run reads is there to its end."""
    if averaged and not has_average(checkpoint):
        return False
    pickles = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    random = sorted(checkpoint.glob("rng_state*.pth"))
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "model.safetensors", "pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(random) and all(zipfile.is_zipfile(path) for path in [*pickles, *random])
