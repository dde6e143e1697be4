"""The objective on text that is not trained on, measured while a stage goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from kronbert.errors import DataError

if TYPE_CHECKING:
    from kronbert.distill.trainer import DistillTrainer

PREFIX = "held_out_"
SEED = 0
"""Of the words that are masked: the same ones in every run, so that curves can be compared."""


def held_out_batches(rows: Any, collator: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """``rows`` through ``collator``, once: a masked word stays masked at every measurement.

    The global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # not every GPU's for good
        return [
            dict(collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))]))
            for start in range(0, len(rows), batch_size)
        ]


def sample_rows(rows: Any, limit: int) -> Any:
    """At most ``limit`` rows of a `Dataset`, evenly spaced over it; no chance in it."""
    if limit < 1:
        raise DataError(f"sample_rows(limit={limit}): expected 1 or more.")
    if len(rows) <= limit:
        return rows
    return rows.select([i * len(rows) // limit for i in range(limit)])


class HeldOut(TrainerCallback):
    """Logs every term as ``held_out_<name>``, with ``held_out_seconds``, at the start, at every
    ``points``-th part of the steps and at the end, each before the checkpoint of that step.

    A resumed run goes on with the curve its checkpoint holds."""

    def __init__(
        self,
        trainer: DistillTrainer,
        batches: Iterable[Mapping[str, Any]],
        points: int,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.trainer, self.batches, self.points, self.say = trainer, list(batches), points, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = max(1, math.ceil(state.max_steps / self.points))
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.measure(state)

    def measure(self, state: Any) -> None:
        start = monotonic()
        losses = self.trainer.objective_losses(self.batches)
        seconds = {f"{PREFIX}seconds": round(monotonic() - start, 2)}
        self.trainer.log({f"{PREFIX}{name}": loss for name, loss in losses.items()} | seconds)
        if self.say is not None:
            said = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
            self.say(f"step {state.global_step} of {state.max_steps}, held-out text: {said}")


def curve_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The held-out points of a log: step and ``loss_<name>`` of every term."""
    return [
        {"step": row["step"]}
        | {
            "loss_" + key.removeprefix(PREFIX): value
            for key, value in row.items()
            if key.startswith(PREFIX) and key != f"{PREFIX}seconds"
        }
        for row in history
        if any(key.startswith(PREFIX) for key in row)
    ]
