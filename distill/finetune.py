"""Runs one stage to its end, resuming an interrupted one, and scores a model on its task."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from kronbert.distill.data import TaskData, compute_metrics
from kronbert.distill.objectives import Objective, Term
from kronbert.distill.stages import Stage
from kronbert.distill.trainer import DistillTrainer
from kronbert.errors import DistillError

POINTS = 10
"""Evaluations, and checkpoints, of one stage."""

CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
"""trainer_state.json is written last: a checkpoint with all of them was finished."""


def run_stage(
    student: nn.Module,
    teacher: nn.Module | None,
    stage: Stage,
    data: Any,
    folder: str | Path,
    *,
    tokenizer: Any,
    precision: str = "auto",
    checkpoints: int = POINTS,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Train ``student`` in place through ``stage``; returns the log (steps, losses, dev metrics).

    data: a tokenised `TaskData`, scored on its first dev set as it goes, or a `Dataset` of packed
    text. folder: holds the checkpoints; a complete one found there is resumed, and all are removed
    at the end. teacher: None when the objective needs none. precision: see `use_bf16`. arguments:
    more of `DistillArguments`. Raises `DistillError`."""
    folder = Path(folder)
    steps = {"eval_steps": 1 / POINTS, "save_steps": 1 / checkpoints, "logging_steps": 1 / 50}
    task = data.task if isinstance(data, TaskData) else None
    args = stage.to_arguments(
        folder,
        **{
            "eval_strategy": "steps" if task else "no",
            "save_strategy": "steps",
            "save_total_limit": 2,
            "train_sampling_strategy": "group_by_length" if task else "random",
            "per_device_eval_batch_size": max(64, stage.batch_size),
            "bf16": use_bf16(precision),
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            **steps,
            **arguments,
        },
    )
    mlm = stage.objective.label_tap == "mlm"
    if task:
        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=mlm)
    trainer = DistillTrainer(
        student,
        args,
        teacher=teacher,
        objective=stage.objective,
        train_dataset=data.train if task else data,
        eval_dataset=next(iter(data.validation.values())) if task else None,
        data_collator=collator,
        compute_metrics=compute_metrics(task) if task else None,
        processing_class=tokenizer,
    )
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    return list(trainer.state.log_history)


def labels_only() -> Objective:
    """Plain fine-tuning: the loss on the labels, no teacher."""
    return Objective(terms=(Term(tap="labels"),))


def evaluate(
    model: nn.Module, data: TaskData, tokenizer: Any, *, batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """The task's metrics on every dev set of tokenised ``data``: set -> metric -> value in float32."""
    args = TrainingArguments(
        output_dir="unused",
        per_device_eval_batch_size=batch_size,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics(data.task),
    )
    scores = {}
    for name, rows in data.validation.items():
        found: Mapping[str, float] = trainer.predict(rows).metrics or {}
        scores[name] = {key: float(found[f"test_{key}"]) for key in data.task.metrics}
    return scores


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; one cut off while it was written is passed
    over."""
    found = sorted(
        (path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()),
        key=lambda path: int(path.name[11:]),
    )
    for path in reversed(found):
        if all((path / name).is_file() for name in CHECKPOINT_FILES):
            return path
    return None


def use_bf16(precision: str) -> bool:
    """Whether to train under bf16 autocast: "bf16", "fp32", or "auto" (where it is fast: CUDA
    devices with bf16, CPUs with AMX tiles)."""
    if precision not in ("auto", "bf16", "fp32"):
        raise DistillError(f"precision={precision!r}: expected 'auto', 'bf16' or 'fp32'.")
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return "amx_tile" in _cpu_flags()


def _cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    text = path.read_text(errors="replace")
    return next((line for line in text.splitlines() if line.startswith("flags")), "")
