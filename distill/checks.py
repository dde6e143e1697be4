"""Whether student, teacher, objective and training arguments go together, asked beforehand."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
)

from kronbert.distill import layer_maps
from kronbert.distill.objectives import Objective
from kronbert.errors import DistillError

HALF = (torch.float16, torch.bfloat16)

# Equal vocabularies that lower-case or strip accents differently give other ids for this.
_PROBE = "Kronecker's Ünïted products, 12.5 % of naïve BERT"

DETECTORS = {"ElectraForPreTraining", "FunnelForPreTraining"}
"""Classes that tell replaced tokens from others."""

MLM_HEADS = {
    name
    for names in (MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_PRETRAINING_MAPPING_NAMES)
    for kind, name in names.items()
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES  # other kinds are pre-trained by their next words
} - DETECTORS
"""Classes with a masked-LM head."""


def _kind(model: nn.Module) -> set[str]:
    """The names of its class and of those that it comes from."""
    return {each.__name__ for each in type(model).__mro__}


def has_masked_lm(config: Any, tokenizer: Any) -> bool:
    """Whether a checkpoint carries a masked-LM head, which stage 1 can train with."""
    saved_as = (config.architectures or [""])[0]
    return saved_as in MLM_HEADS and tokenizer.mask_token is not None


def check_pair(
    student: nn.Module,
    teacher: nn.Module | None,
    objective: Objective,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
) -> None:
    """Raise `DistillError` if this student cannot learn this objective from this teacher."""
    for who, model in (("student", student), ("teacher", teacher)):
        if getattr(getattr(model, "config", None), "return_dict", True) is False:
            raise DistillError(
                f"the {who}'s config.return_dict is False, but its outputs are read by name. "
                "Set it to True."
            )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise DistillError(
            f"no parameter of the student ({type(student).__name__}) requires a gradient, so "
            "nothing would be learnt: a teacher that an earlier DistillTrainer froze, or a student "
            "converted from one? Call student.requires_grad_(True)."
        )
    trained = ((name, p) for name, p in student.named_parameters() if p.requires_grad)
    half = next(((name, p.dtype) for name, p in trained if p.dtype in HALF), None)
    if half is not None:
        kind = str(half[1]).removeprefix("torch.")
        raise DistillError(
            f"the student's {half[0]!r} is in {kind}, which loses the optimiser's steps. Load "
            "it with dtype=torch.float32 (or call student.float()), and train with bf16=True or "
            "fp16=True: autocast computes in half precision and keeps the weights whole."
        )
    if "mlm" in objective.taps and not _kind(student) & MLM_HEADS:
        raise DistillError(
            f"the objective has the term 'mlm', but {type(student).__name__} has no masked-LM "
            "head. Load the student with AutoModelForMaskedLM, or drop the term."
        )
    if not objective.teacher_taps:
        return
    if teacher is None:
        raise DistillError(
            f"the terms {', '.join(sorted(objective.teacher_taps))} need a teacher: pass "
            "teacher=, or train on labels."
        )
    _check_apart(student, teacher)
    _check_vocabulary(student, teacher, tokenizer, teacher_tokenizer)
    _check_sizes(student, teacher, objective)
    if "logits" in objective.taps:
        _check_labels(student, teacher, objective)


def supervised_layers(
    student: nn.Module, teacher: nn.Module, objective: Objective
) -> tuple[int, ...]:
    """The resolved layer map; empty if no term reads layers."""
    if not {"scores", "ffn"} & objective.taps:
        return ()
    depths = [_size(model, "num_hidden_layers") for model in (student, teacher)]
    return layer_maps.resolve(objective.layer_map, *depths)


def check_arguments(args: TrainingArguments, objective: Objective, compute_loss_func: Any) -> None:
    """Refuse training arguments that a distillation loss would ignore or break."""
    if args.label_smoothing_factor:
        raise DistillError(
            f"label_smoothing_factor={args.label_smoothing_factor}: the labels term is the "
            "student's own loss. Set it to 0; a logits term with loss='kl' softens the labels."
        )
    if compute_loss_func is not None:
        raise DistillError(
            "compute_loss_func: DistillTrainer's loss is its objective. Write it as terms, or use "
            "transformers' Trainer."
        )
    if args.torch_compile:
        raise DistillError(
            "torch_compile=True: the taps are forward hooks, which a compiled model skips. Set "
            "torch_compile=False."
        )
    if getattr(args, "muon_rate", None) is not None:
        name = getattr(args.optim, "value", args.optim)
        if name not in ("adamw_torch", "adamw_torch_fused"):
            raise DistillError(
                f"muon_rate with optim={name}: all that is no matrix of a Kronecker layer "
                "takes AdamW's steps. Set optim='adamw_torch_fused', or leave muon_rate out."
            )
    if getattr(args, "ema", None) is not None:
        if args.load_best_model_at_end:
            raise DistillError(
                "ema with load_best_model_at_end: the student that a run leaves is either its "
                "averaged weights or its best checkpoint. Set one of them."
            )
        if getattr(args.save_strategy, "value", args.save_strategy) == "best":
            raise DistillError(
                "ema with save_strategy='best': what is measured is the average, what is saved as "
                "the best model are the weights it is an average of. Save by steps or epochs."
            )
    check_whole(args, sharded=bool(args.fsdp or args.deepspeed))
    if args.n_gpu > 1:
        raise DistillError(
            f"{args.n_gpu} GPUs in one process: DataParallel's threads would share the taps. Start "
            "one process per GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES."
        )


def check_whole(args: TrainingArguments, *, sharded: bool) -> None:
    """Refuse what needs whole parameters where they are ``sharded``: asked of the arguments, and
    again once accelerate has read its own settings (``accelerate launch``)."""
    for key, why in _WHOLE.items():
        if sharded and getattr(args, key, None) is not None:
            raise DistillError(
                f"{key} with fsdp or deepspeed: {why}. Leave {key} out, or train with torchrun "
                "alone."
            )


_WHOLE = {
    "muon_rate": "they share matrices out, and Muon's steps need whole ones",
    "ema": "they share parameters out or replace them, and the average is of whole ones",
}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary, the special tokens, and the ids of one accented sentence."""
    content = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        tokenizer(_PROBE)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    theirs = {id(p) for p in teacher.parameters()}
    shared = next((name for name, p in student.named_parameters() if id(p) in theirs), None)
    if shared is not None:
        raise DistillError(
            f"student and teacher share the parameter {shared!r}: training one would change the "
            "other. Pass copy.deepcopy(teacher), or convert without inplace=True."
        )


def _check_vocabulary(
    student: nn.Module, teacher: nn.Module, tokenizer: Any, teacher_tokenizer: Any
) -> None:
    if hasattr(tokenizer, "get_vocab") and hasattr(teacher_tokenizer, "get_vocab"):
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(teacher_tokenizer):
            raise DistillError(
                f"student and teacher have different tokenizers ({type(tokenizer).__name__} of "
                f"{len(tokenizer)} tokens, {type(teacher_tokenizer).__name__} of "
                f"{len(teacher_tokenizer)}): the same ids mean other words. Distil from a teacher "
                "with the student's tokenizer."
            )
        return
    for key in ("vocab_size", "image_size", "patch_size"):
        mine, theirs = (getattr(model.config, key, None) for model in (student, teacher))
        if mine != theirs:
            raise DistillError(
                f"student and teacher read different inputs: {key} is {mine} for the student, "
                f"{theirs} for the teacher. Distil from a teacher with the student's tokenizer or "
                "image size."
            )


def _check_sizes(student: nn.Module, teacher: nn.Module, objective: Objective) -> None:
    wide = sorted(objective.taps & {"embedding", "ffn", "sentence"})
    if wide:
        mine, theirs = (_size(model, "hidden_size") for model in (student, teacher))
        if mine != theirs:
            raise DistillError(
                f"the terms {' and '.join(wide)} compare hidden states, but the student is {mine} "
                f"wide and the teacher {theirs}. Use the terms logits and labels only, or a "
                f"teacher {mine} wide."
            )
    if "scores" in objective.taps:
        mine, theirs = (_size(model, "num_attention_heads") for model in (student, teacher))
        if mine != theirs:
            raise DistillError(
                f"the term scores compares head by head, but the student has {mine} heads and the "
                f"teacher {theirs}. Drop the term, or take a teacher with {mine} heads."
            )


def _check_labels(student: nn.Module, teacher: nn.Module, objective: Objective) -> None:
    if _kind(student) & MLM_HEADS:
        return
    if told := _kind(student) & DETECTORS:
        raise DistillError(
            f"the term logits: {', '.join(told)} says of every token whether it was replaced, "
            "which no loss here compares. Drop the term."
        )
    mine, theirs = (_size(model, "num_labels") for model in (student, teacher))
    if mine != theirs:
        raise DistillError(
            f"the term logits needs as many labels on both sides: the student has {mine}, the "
            f"teacher {theirs}. Load the student with num_labels={theirs}, or drop the term."
        )
    if mine == 1 and any(t.loss == "kl" for t in objective.active):
        raise DistillError("Term(tap='logits', loss='kl') of one output is always 0: use 'mse'.")
    kinds = {getattr(model.config, "problem_type", None) for model in (student, teacher)}
    if "multi_label_classification" in kinds and any(t.loss == "kl" for t in objective.active):
        raise DistillError(
            "Term(tap='logits', loss='kl') compares one choice among the labels, but "
            "problem_type='multi_label_classification' decides on each by itself: use 'mse'."
        )
    named: list[list[str]] = []
    for model in (student, teacher):
        id2label: Any = getattr(model.config, "id2label", None) or {}
        named.append([id2label.get(i, "") for i in range(mine)])
    if named[0] != named[1] and sorted(named[0]) == sorted(named[1]):
        raise DistillError(
            f"the same labels in another order: student {named[0]}, teacher {named[1]}. Reorder "
            "the student's id2label and the data's label ids."
        )


def _size(model: nn.Module, key: str) -> int:
    value = getattr(model.config, key, None)
    if not isinstance(value, int):
        raise DistillError(
            f"{type(model.config).__name__} has no {key}: use the terms logits and labels only."
        )
    return value
