"""Runs one stage to its end, resuming an interrupted one, and scores a model on its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EvalPrediction,
    ProgressCallback,
)

from kronbert.distill.begun import ASKED, claim, noted
from kronbert.distill.checkpoints import all_checkpoints, last_checkpoint, remove, step_of
from kronbert.distill.checks import check_pair, supervised_layers
from kronbert.distill.cpu_layers import fused_layers, plain_attention
from kronbert.distill.data import TaskData, compute_metrics, row_lengths
from kronbert.distill.digests import rows_digest, structure_digest
from kronbert.distill.dropout import dropout_set_to
from kronbert.distill.freed import ReleaseFreed
from kronbert.distill.held_out import HeldOut, held_out_batches
from kronbert.distill.objectives import Objective, Term
from kronbert.distill.padding import FewLengths
from kronbert.distill.pieces import BatchMasks, Pieces
from kronbert.distill.sampling import SeededSampler
from kronbert.distill.stages import Stage
from kronbert.distill.taps import inputs_of
from kronbert.distill.teacher_cache import (
    States,
    WithStates,
    model_digest,
    states_wanted,
    with_teacher,
)
from kronbert.distill.trainer import DistillTrainer
from kronbert.distill.unlabelled import training_rows
from kronbert.errors import DistillError
from kronbert.prepared import own_forward

POINTS = 10
"""Evaluations, and checkpoints, of one stage."""

CURVE_ROWS = 2000
"""Rows of the dev set in each of these evaluations, at most: MiniLM took 192 s for MNLI's 9,815 on
one core of an AMD EPYC, beside other work, and would take them ten times. `evaluate` takes all."""

WATCHING = (
    *("eval_", "per_device_eval_", "log_", "logging_", "save_", "report_to", "run_name"),
    *("disable_tqdm", "dataloader_", "gradient_checkpointing", "torch_compile", "use_cpu"),
)
"""Beginnings of arguments that may be others when a stage goes on: how it is watched, and with what
it computes the same."""

CACHE = "teacher-outputs"
"""The folder of `teacher_cache`, beside that of a run."""


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
    keep_last: bool = False,
    held_out: Any = None,
    cache: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Train ``student`` in place through ``stage``; returns the log (steps, losses, dev metrics).

    data: a tokenised `TaskData`, scored as it goes on ``CURVE_ROWS`` of its first dev set, or a
    `Dataset` of packed text. folder: holds the checkpoints; the newest whole one found there is
    resumed, to the same weights as without the interruption; one of another stage, teacher, rows,
    precision, student (its structure, not its weights) or ``arguments``, but for those of
    `WATCHING`, is refused. keep_last: leave the last one for a caller who has yet to save the
    result, and removes the folder then. teacher: None when the objective needs none. held_out:
    packed text that is not trained on; the objective's losses on it are logged as
    `held_out.HeldOut` says. cache: the folder of a stage with ``cache_teacher``, by default
    ``teacher-outputs`` beside ``folder``. precision: see `use_bf16`. arguments: more of
    `DistillArguments`. Raises `DistillError`."""
    folder = Path(folder)
    last = last_checkpoint(folder, averaged=stage.ema is not None)
    if precision == "auto" and last is not None:
        precision = noted(folder, "precision") or "auto"  # this machine's may be another
    task = data.task if isinstance(data, TaskData) else None
    args = replace(stage, cache_teacher=False, pieces=()).to_arguments(
        folder,
        **{
            "eval_strategy": "steps" if task else "no",
            "eval_steps": 1 / POINTS,
            "save_strategy": "steps",
            "save_steps": 1 / checkpoints,
            "logging_steps": 1 / 50,
            "save_total_limit": 2,
            "train_sampling_strategy": "group_by_length" if task else "random",
            "per_device_eval_batch_size": max(64, stage.batch_size),
            "bf16": use_bf16(precision),
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            "disable_tqdm": False,
            **arguments,
        },
    )
    if stage.pieces and task:
        raise DistillError(
            f"Stage({stage.name!r}, pieces={stage.pieces}): task rows have lengths of their own; "
            "only packed text is cut. Leave pieces out."
        )
    rows = training_rows(data, stage) if isinstance(data, TaskData) else data
    asked = {key: value for key, value in stage.to_dict().items() if key != "cache_teacher"}
    asked |= {
        "rows": rows_digest(rows),
        "teacher": None if teacher is None else model_digest(teacher),
        "student": structure_digest(student),
        "precision": "bf16" if args.bf16 else "fp32",
    }
    if more := {k: str(v) for k, v in arguments.items() if not k.startswith(WATCHING)}:
        asked["arguments"] = more
    states: States | None = None
    if stage.cache_teacher:
        check_pair(student, teacher, stage.objective, tokenizer)  # before the long computation
        assert teacher is not None  # checked
        kept = states_of(student, teacher, stage)
        place = cache or folder.parent / CACHE
        rows, states = _taught(rows, teacher, kept, args, place, tokenizer, say)
    if task:
        collator: Any = FewLengths(tokenizer, max(row_lengths(rows), default=0))
    else:
        mlm = stage.objective.label_tap == "mlm"
        collator = BatchMasks(DataCollatorForLanguageModeling(tokenizer, mlm=mlm))
    whole = collator
    if stage.pieces:
        collator = Pieces(collator, stage.pieces, tokenizer)
    if states is not None:
        collator = WithStates(collator, states)
    trainer = _StageTrainer(
        student,
        args,
        teacher=teacher,
        objective=stage.objective,
        train_dataset=rows,
        eval_dataset=_curve_rows(next(iter(data.validation.values()))) if task else None,
        data_collator=collator,
        compute_metrics=compute_metrics(task) if task else None,
        processing_class=tokenizer,
    )
    trainer.mixed = task is None
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(_Bar)
    trainer.add_callback(ReleaseFreed())
    if held_out is not None:
        batches = held_out_batches(held_out, whole, trainer.args.per_device_eval_batch_size)
        trainer.add_callback(HeldOut(trainer, batches, POINTS, say))
    done = 0 if last is None else step_of(last)
    remove([path for path in all_checkpoints(folder) if step_of(path) > done], trainer)  # cut off
    claim(folder, asked, begun=last is not None)
    if last is not None and say is not None:
        say(f"resumed after step {done}")
    autocast = args.bf16 or args.fp16
    with (
        own_forward(student),
        dropout_set_to(student, stage.dropout),  # by that layers are fused
        fused_layers(student, autocast=autocast),
        plain_attention(student, autocast=autocast),
    ):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if not keep_last:
        remove([*all_checkpoints(folder), folder / ASKED], trainer)
    return list(trainer.state.log_history)


def _curve_rows(rows: Any) -> Any:
    """``CURVE_ROWS`` of ``rows``, evenly spaced by length, or all; those of one length lie
    together, so that batches of short ones are short."""
    order = np.argsort(row_lengths(rows), kind="stable")
    few = min(CURVE_ROWS, len(order))
    return rows.select(order[np.arange(few) * len(order) // few])


def states_of(student: nn.Module, teacher: nn.Module, stage: Stage) -> tuple[int, ...]:
    """Which hidden states of ``teacher`` the stage reads; 0 is the embedding's output."""
    layers = supervised_layers(student, teacher, stage.objective)
    return states_wanted(stage.objective.teacher_taps, layers)


def _taught(
    rows: Any,
    teacher: nn.Module,
    layers: tuple[int, ...],
    args: Any,
    cache: str | Path,
    tokenizer: Any,
    say: Callable[[str], None] | None,
) -> tuple[Any, States | None]:
    """``rows`` with what the teacher gives; one process computes it, the others read it."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    with args.main_process_first(desc="the teacher's outputs"):
        return with_teacher(
            rows,
            teacher,
            cache,
            tokenizer=tokenizer,
            layers=layers,
            device=args.device,
            autocast=dtype,
            batch_size=args.per_device_eval_batch_size,
            say=say,
        )


class _StageTrainer(DistillTrainer):
    """Draws an epoch's batches from seed and epoch alone, so that a resumed run sees the rows that
    the interrupted one had left; transformers' length grouping draws from the global generator.
    mixed: see `SeededSampler`."""

    mixed = False

    def _run_epoch(self, **told: Any) -> Any:  # type: ignore[override]
        """Not one more step of an epoch of which the stage has a part, resumed at its last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(**told)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length"):
            raise DistillError(
                f"run_stage(train_sampling_strategy={strategy!r}): expected 'random' or "
                "'group_by_length'. For others use DistillTrainer."
            )
        grouped = strategy == "group_by_length"
        return SeededSampler(
            len(rows),
            row_lengths(rows) if grouped else None,
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lambda: self.args.seed * 1000 + int(self.state.epoch or 0),
            mixed=self.mixed,
        )


class _Bar(ProgressCallback):
    """The progress bar with time left; losses and scores beside it, not on lines of their own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {k.removeprefix("eval_"): v for k, v in logs.items() if k in _SHOWN}
            if shown:
                self.seen = {**getattr(self, "seen", {}), **shown}
                self.training_bar.set_postfix({k: f"{float(v):.3g}" for k, v in self.seen.items()})

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Dev sets are short: no bar of their own."""


_SHOWN = ("loss", "eval_accuracy", "eval_f1", "eval_matthews", "eval_spearman")


def commonest_class(rows: TaskData) -> dict[str, dict[str, float]] | None:
    """What `evaluate` gives a model that always says the commonest class of the training rows.

    rows: tokenised. None for a regression, which has no classes."""
    if rows.task.labels is None:
        return None
    answer = int(np.bincount(rows.train["labels"]).argmax())
    score = compute_metrics(rows.task)
    found = {}
    for name, dev in rows.validation.items():
        logits = np.zeros((len(dev), rows.task.num_labels))
        logits[:, answer] = 1
        found[name] = score(EvalPrediction(predictions=logits, label_ids=np.array(dev["labels"])))
    return found


def labels_only() -> Objective:
    """Plain fine-tuning: the loss on the labels, no teacher."""
    return Objective(terms=(Term(tap="labels"),))


def evaluate(
    model: nn.Module, data: TaskData, tokenizer: Any, *, batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """The task's metrics on every dev set of tokenised ``data``: set -> metric -> value.

    As `answers` computes them."""
    score = compute_metrics(data.task)
    found = answers(model, data, tokenizer, batch_size=batch_size)
    return {name: score(one) for name, one in found.items()}


def answers(
    model: nn.Module, data: TaskData, tokenizer: Any, *, batch_size: int = 64
) -> dict[str, EvalPrediction]:
    """Logits (rows, labels) and labels of every dev set of tokenised ``data``, in its order.

    Without autocast, in eval mode, on the GPU where there is one (the model stays there)."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    was_training = model.training
    model.eval()
    try:
        with own_forward(model):
            return {
                name: _predict(model, rows, tokenizer, batch_size)
                for name, rows in data.validation.items()
            }
    finally:
        model.train(was_training)


def _predict(model: nn.Module, rows: Any, tokenizer: Any, batch_size: int) -> EvalPrediction:
    """Logits and labels in the order of ``rows``; rows of one length share a batch."""
    device = next(model.parameters()).device
    taken = inputs_of(model) - {"labels"}
    collate = DataCollatorWithPadding(tokenizer)
    order = np.argsort(row_lengths(rows), kind="stable")
    logits: list[Any] = [None] * len(rows)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size].tolist()
        batch = collate([rows[i] for i in picked])
        inputs = {name: value.to(device) for name, value in batch.items() if name in taken}
        with torch.inference_mode():
            found = model(**inputs).logits.float().cpu().numpy()
        for i, row in zip(picked, found, strict=True):
            logits[i] = row
    return EvalPrediction(predictions=np.stack(logits), label_ids=np.array(list(rows["labels"])))


def use_bf16(precision: str) -> bool:
    """Whether to train under bf16 autocast: "bf16", "fp32", or "auto" (where it is fast: CUDA
    devices with bf16, CPUs with AMX tiles or AVX-512's bf16 products; on one thread of an AMD EPYC
    with the latter, Zen 4, a step of a MiniLM student takes 0.63 to 0.80 of its time in fp32)."""
    if precision not in ("auto", "bf16", "fp32"):
        raise DistillError(f"precision={precision!r}: expected 'auto', 'bf16' or 'fp32'.")
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not {"amx_tile", "avx512_bf16"}.isdisjoint(_cpu_flags().split())


def _cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    text = path.read_text(errors="replace")
    return next((line for line in text.splitlines() if line.startswith("flags")), "")
