"""`DistillTrainer`: transformers' Trainer whose loss is an objective between two models."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from kronbert.distill.checks import check_arguments, check_pair, supervised_layers
from kronbert.distill.layer_maps import LayerMap
from kronbert.distill.objectives import Objective, term_losses
from kronbert.distill.taps import Captured, Taps
from kronbert.errors import DistillError


@dataclass
class DistillArguments(TrainingArguments):
    """transformers' TrainingArguments that log the first step: curves start untrained."""

    logging_first_step: bool = True


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
        self._student_inputs = _inputs_of(model)
        self._teacher_inputs = _inputs_of(teacher) if teacher is not None else frozenset()

        super().__init__(model, args, **kwargs)
        # The loss is a batch mean, which Trainer divides by the number of accumulated batches if it
        # is told: by the first name up to transformers 5.17 at least, by the second in 5.23.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.teacher = teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps = 0

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's columns: DistilBERT reads no token_type_ids, a BERT teacher does."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: list[str] = list(self._signature_columns or ())
            extra = self._teacher_inputs - set(columns)
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
        given = _only(inputs, self._teacher_inputs, self.label_names)
        with torch.no_grad(), self.accelerator.autocast():
            with self._teacher_taps.capture() as captured:
                self.teacher(**given)
        return captured

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


def _inputs_of(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters) - {"kwargs"}


def _only(
    inputs: Mapping[str, Any], names: Collection[str], dropped: Collection[str] = ()
) -> dict[str, Any]:
    return {name: inputs[name] for name in inputs if name in names and name not in dropped}


def _token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise DistillError(
            f"attention_mask {tuple(mask.shape)}: expected (batch, tokens), 1 for a token and 0 "
            "for padding."
        )
    return mask
