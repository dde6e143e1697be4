"""An exponential moving average of the student's weights: kept, saved, resumed, put in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from kronbert.errors import DistillError

FILE = "average.safetensors"
"""The average, in a checkpoint's folder beside ``model.safetensors``, which keeps the weights that
are trained."""


def decay_at(step: int, decay: float) -> float:
    """The share of the old average that stays at ``step`` (from 1): ``decay``, once enough steps
    are behind that an average over about 1 / (1 - decay) of them is not mostly the start."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(TrainerCallback):
    """Averages the trainable parameters of ``model`` after every step, in float32.

    Frozen ones have no second copy. At the end of training the model holds the average."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self._model = decay, model
        self.trained: dict[str, nn.Parameter] = {}
        self.average: dict[str, Tensor] = {}
        self.resumed_from: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # As the optimizer finds them. Without duplicates: a tied weight is averaged once.
        self.trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        if state.global_step and self.resumed_from is not None:
            self._read(self.resumed_from)
        else:
            self.average = {
                name: p.detach().to(torch.float32, copy=True) for name, p in self.trained.items()
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = [p.detach().to(self.average[n]) for n, p in self.trained.items()]
        update = get_ema_multi_avg_fn(decay_at(state.global_step, self.decay))
        update(list(self.average.values()), weights, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            # Whole or not there, for whoever looks for the newest whole checkpoint.
            save_file(self.average, folder / f"{FILE}.part")
            os.replace(folder / f"{FILE}.part", folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put(self.average)
        self.average = {}  # from here on the model is the caller's

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model's weights are the average inside the ``with``."""
        if not self.average:
            yield
            return
        before = {name: p.detach().clone() for name, p in self.trained.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        # copy_ and not .data: the CPU engine sees that what it kept of the matrices is old.
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])

    def _read(self, checkpoint: Path) -> None:
        if not has_average(checkpoint):
            raise DistillError(
                f"{checkpoint}: no whole {FILE}, so the average of the weights cannot go on: it "
                "was saved without ema. Resume without ema, or start anew in another folder."
            )
        saved = load_file(checkpoint / FILE)
        if {n: p.shape for n, p in saved.items()} != {n: p.shape for n, p in self.trained.items()}:
            raise DistillError(
                f"{checkpoint / FILE}: other parameters than the student trains. Resume with the "
                "same student, or start anew in another folder."
            )
        self.average = {name: saved[name].to(p.device) for name, p in self.trained.items()}


def has_average(checkpoint: Path) -> bool:
    """Whether the checkpoint has an average that can be read."""
    try:
        with safe_open(checkpoint / FILE, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
