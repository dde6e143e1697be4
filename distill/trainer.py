"""`DistillTrainer`: transformers' Trainer whose loss is an objective between two models."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import find_labels

from kronbert.distill.averaging import WeightAverage
from kronbert.distill.checks import check_arguments, check_pair, check_whole, supervised_layers
from kronbert.distill.dropout import dropout_set_to
from kronbert.distill.layer_maps import LayerMap
from kronbert.distill.muon import with_muon
from kronbert.distill.objectives import Objective, term_losses
from kronbert.distill.rates import rate_factors, split_groups
from kronbert.distill.score_head import exact_scores
from kronbert.distill.stages import CACHED, check_switches
from kronbert.distill.taps import Captured, Taps, inputs_of
from kronbert.distill.teacher_cache import (
    TEACHER_LAYERS,
    TEACHER_LOGITS,
    TEACHER_ROW,
    TEACHER_STATES,
    as_captured,
    states_wanted,
)
from kronbert.errors import DistillError
from kronbert.prepared import unprepare


@dataclass
class DistillArguments(TrainingArguments):
    """transformers' TrainingArguments that log the first step: curves start untrained.

    ema, small_rate, embedding_rate, muon_rate, dropout: as in `kronbert.distill.Stage`."""

    logging_first_step: bool = True
    ema: float | None = None
    small_rate: float = 1.0
    embedding_rate: float = 1.0
    muon_rate: float | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        check_switches("DistillArguments", self)
        super().__post_init__()


class DistillTrainer(Trainer):
    """Trains ``model`` on ``objective`` with ``teacher``; all else is transformers' Trainer.

    model: the student. teacher: put in eval mode, frozen and moved to the student's device; None
    when the objective has labels or mlm only. layer_map: replaces the objective's.
    teacher_processing_class: the teacher's tokenizer, compared with ``processing_class``; without
    both, vocabulary sizes are compared. kwargs: Trainer's.

    The loss is the mean over one process's batch; accumulated batches and processes are averaged
    with equal weight. Every term is logged as ``loss_<name>``, before its weight. `evaluate` and
    `predict` see the student alone: ``eval_loss`` is its own loss on the labels. Raises
    `DistillError`, before anything is moved or trained, if the parts do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | None,
        objective: Objective,
        layer_map: LayerMap | None = None,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if layer_map is not None:
            objective = replace(objective, layer_map=layer_map)
        if model is None or kwargs.get("model_init") is not None:
            raise DistillError(
                "DistillTrainer needs model=, not model_init=: the student is checked against its "
                "teacher before training."
            )
        args = args if args is not None else DistillArguments(output_dir="tmp_trainer")
        check_arguments(args, objective, kwargs.get("compute_loss_func"))
        tokenizer = kwargs.get("processing_class")
        check_pair(model, teacher, objective, tokenizer, teacher_processing_class)
        if not objective.teacher_taps:
            teacher = None
        self.objective: Objective = objective
        self.layers: tuple[int, ...] = ()
        self._teacher_taps: Taps | None = None
        if teacher is not None:
            self.layers = supervised_layers(model, teacher, objective)
            read = sorted({n for n in self.layers if n})
            self._teacher_taps = Taps(teacher, objective.teacher_taps, read)
        supervised = [m for m, n in enumerate(self.layers, start=1) if n]
        self._student_taps = Taps(model, objective.teacher_taps, supervised)
        self._student_inputs = inputs_of(model)
        unprepare(model)
        self._teacher_inputs = inputs_of(teacher) if teacher is not None else frozenset()

        super().__init__(model, args, **kwargs)
        # The loss is a batch mean, which Trainer divides by the number of accumulated batches if it
        # is told: by the first name up to transformers 5.17 at least, by the second in 5.23.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.teacher = teacher
        if teacher is not None:
            unprepare(teacher.eval().requires_grad_(False))
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps = 0
        self._given_optimizer = self.optimizer is not None
        self._average: WeightAverage | None = None
        check_whole(args, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        decay: float | None = getattr(args, "ema", None)
        if decay is not None:
            self._average = WeightAverage(model, decay)
            # Before the caller's, which see at the end of training what it leaves.
            self.callback_handler.callbacks.insert(0, self._average)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kw: Any) -> Any:
        """Trainer's, with the arguments' ``dropout``; with ``ema`` the model holds the averaged
        weights at its end."""
        if self._average is not None and resume_from_checkpoint:
            found = resume_from_checkpoint
            if found is True:
                found = get_last_checkpoint(self.args.output_dir)
            self._average.resumed_from = Path(found) if found else None
        self._term_sums, self._term_steps = {}, 0
        student: Any = self.model
        if self.model_wrapped is student:  # one in DistributedDataParallel is not prepared again
            unprepare(student)
        dropout = getattr(self.args, "dropout", None)
        with dropout_set_to(student, dropout), exact_scores(student, self.teacher):
            return super().train(resume_from_checkpoint, *args, **kw)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, of the averaged weights where the arguments have ``ema``."""
        with self._averaged(), exact_scores(self.model):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, of the averaged weights where the arguments have ``ema``."""
        with self._averaged(), exact_scores(self.model):
            return super().predict(*args, **kwargs)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.in_place()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's, with parameter groups of their own for `rates.rate_factors`, and for Muon."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {key: getattr(self.args, key, 1.0) for key in ("small_rate", "embedding_rate")}
        muon: float | None = getattr(self.args, "muon_rate", None)
        if any(rate != 1 for rate in rates.values()) or muon is not None:
            if self._given_optimizer:
                told = rates if muon is None else {**rates, "muon_rate": muon}
                raise DistillError(
                    f"DistillTrainer(optimizers=...) with {told}: the rates of a given optimizer "
                    "are its own. Leave one of the two out."
                )
            model: Any = self.model
            if fresh and muon is not None and not isinstance(optimizer, torch.optim.AdamW):
                raise DistillError(
                    f"DistillTrainer(optimizer_cls_and_kwargs=...) with muon_rate={muon}: what has "
                    f"no Muon has AdamW, not {type(optimizer).__name__}. Leave one of the two out."
                )
            if fresh and muon is not None:
                self.optimizer = optimizer = with_muon(optimizer, model, muon)
            if fresh:
                split_groups(optimizer, rate_factors(model, **rates))
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's columns: DistilBERT reads no token_type_ids, a BERT teacher does."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: list[str] = list(self._signature_columns or ())
            extra = {*self._teacher_inputs, TEACHER_LOGITS, TEACHER_ROW} - set(columns)
            self._signature_columns: Any = [*columns, *sorted(extra)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective in training; the student's own loss in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        tap = self.objective.label_tap
        if tap is not None and not any(name in inputs for name in self.label_names):
            raise DistillError(
                f"the objective has the term {tap!r}, but the batch has no "
                f"{' or '.join(self.label_names) or 'labels'}, only {', '.join(sorted(inputs))}. "
                f"{_LABEL_ADVICE[tap]}, or drop the term."
            )
        teacher = self._teach(inputs)
        mask = _token_mask(inputs)

        def finish(student: Captured) -> Any:
            losses = term_losses(self.objective, student, teacher, mask, self.layers)
            self._record(losses)
            weights = {self.objective.name(term): term.weight for term in self.objective.active}
            total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
            # Else DistributedDataParallel runs an empty backward pass through an unused head.
            for name, value in student.outputs.items():
                if isinstance(value, Tensor):
                    student.outputs[name] = value.detach()
            student.outputs["loss"] = total
            return student.outputs

        # With labels the student computes its own loss, over a whole vocabulary perhaps.
        dropped = self.label_names if tap is None else ()
        with self._student_taps.capture(finish):
            outputs = model(**_only(inputs, self._student_inputs, dropped))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _teach(self, inputs: Mapping[str, Any]) -> Captured | None:
        """What the teacher's taps see, in the student's autocast.

        Under no_grad: autograd could not save the tensors of inference_mode.
        """
        if self.teacher is None or self._teacher_taps is None:
            return None
        wanted = states_wanted(self.objective.teacher_taps, self.layers)
        states = inputs.get(TEACHER_STATES)
        kept = TEACHER_LOGITS in inputs and (states is not None or not wanted)
        if kept and self.objective.teacher_taps <= CACHED:
            found = Captured()
            if states is not None:
                found = as_captured(states, inputs[TEACHER_LAYERS][0].tolist(), wanted)
            found.outputs = SequenceClassifierOutput(logits=inputs[TEACHER_LOGITS])
            return found
        given = _only(
            inputs, self._teacher_inputs, {*self.label_names, *find_labels(type(self.teacher))}
        )
        with torch.no_grad(), self.accelerator.autocast():
            with self._teacher_taps.capture() as captured:
                self.teacher(**given)
        return captured

    def objective_losses(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Every active term's mean loss on ``batches``, before its weight: nothing is trained, and
        no random number is drawn.

        In eval mode, under the training's autocast. A batch counts by its rows, so the means are
        exact for terms that are means over rows of one length."""
        model = self.accelerator.unwrap_model(self.model)
        dropped = self.label_names if self.objective.label_tap is None else ()
        sums: dict[str, Tensor] = {}
        rows, was_training = 0, model.training
        model.eval()
        try:
            with self._averaged(), exact_scores(model, self.teacher):
                for batch in batches:
                    inputs = self._prepare_inputs(dict(batch))
                    teacher = self._teach(inputs)
                    with torch.no_grad(), self.accelerator.autocast():
                        with self._student_taps.capture() as student:
                            model(**_only(inputs, self._student_inputs, dropped))
                    count = len(next(iter(inputs.values())))
                    losses = term_losses(
                        self.objective, student, teacher, _token_mask(inputs), self.layers
                    )
                    for name, loss in losses.items():
                        sums[name] = sums.get(name, torch.zeros_like(loss)) + count * loss.float()
                    rows += count
        finally:
            model.train(was_training)
        if not rows:
            raise DistillError("objective_losses: no batch. Give one row at least.")
        return {name: float(total) / rows for name, total in sums.items()}

    def _record(self, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            value = loss.detach().float()
            self._term_sums[name] = self._term_sums.get(name, torch.zeros_like(value)) + value
        self._term_steps += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with every term's mean since the last time, over all processes."""
        if "loss" in logs and self._term_steps:
            means = torch.stack(list(self._term_sums.values())) / self._term_steps
            means = self.accelerator.reduce(means, reduction="mean")
            for name, value in zip(self._term_sums, means.tolist(), strict=True):
                logs[f"loss_{name}"] = value
            self._term_sums, self._term_steps = {}, 0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Trainer's, on the student's inputs only."""
        given = _only(inputs, {*self._student_inputs, *self.label_names})
        return super().prediction_step(model, given, prediction_loss_only, ignore_keys)


_LABEL_ADVICE = {
    "labels": "Add the column to the data",
    "mlm": "Mask words with DataCollatorForLanguageModeling",
}


def _only(
    inputs: Mapping[str, Any], names: Collection[str], dropped: Collection[str] = ()
) -> dict[str, Any]:
    return {name: inputs[name] for name in inputs if name in names and name not in dropped}


def _token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask: Tensor | None = inputs.get("attention_mask")
    ids = inputs.get("input_ids")
    if mask is not None and mask.dim() == 3 and ids is not None and mask.shape == ids.shape:
        return mask.flatten(0, 1)  # several choices: the encoder has each as a row
    if mask is not None and mask.dim() != 2:
        raise DistillError(
            f"attention_mask {tuple(mask.shape)}: expected (batch, tokens), 1 for a token and 0 "
            "for padding."
        )
    return mask
