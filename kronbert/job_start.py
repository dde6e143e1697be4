"""Where stage 2 starts from: does a pre-distilled student descend from this teacher's base?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import Rule
from .errors import DistillError
from .job_models import model_name
from .shipped import find_shipped, is_shipped_name, known_students, list_students, read_report

SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
)
SAMPLE = 512
"""Entries of the word-embedding table that a report holds, evenly spaced: two tables of other
origin then have a cosine of 0 with a standard error of 0.04."""

ALIKE = 0.9
"""Least cosine of a base's word embeddings with a fine-tuned teacher's. MiniLM-L6 has 0.9999 when
fine-tuned on MRPC and 0.9997 on SST-2; -0.02 with its rows in another order."""

BELOW, ABOVE = 0.995, 1.1
"""Of the asked factor, what a student may have: the head of a task, which is not converted, takes a
fraction of a per cent, and plans end above the asked factor."""

POOLER = "pooler."


def describe_teacher(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What tells this base model from others, in JSON: sizes, vocabulary, word embeddings."""
    from .distill.checks import tokenizer_fingerprint

    table = model.get_input_embeddings().weight.detach().float().cpu()
    return {
        "parameters": model.num_parameters(),
        "sizes": {key: getattr(model.config, key, None) for key in SIZES},
        "vocabulary": tokenizer_fingerprint(tokenizer),
        "embedding_digest": hashlib.sha256(table.numpy().tobytes()).hexdigest(),
        "embedding_sample": [float(f"{value:.4g}") for value in sample_entries(table).tolist()],
    }


def sample_entries(table: torch.Tensor) -> torch.Tensor:
    """`SAMPLE` entries of a table (rows, width), the same places for tables of one shape."""
    flat = table.detach().flatten()
    # An odd step, else few columns would be met where the width is a power of two.
    step = max(1, len(flat) // SAMPLE - 1) | 1
    return flat[::step][:SAMPLE].float().cpu()


@dataclass(frozen=True, kw_only=True)
class Start:
    """A pre-distilled student that suits the teacher. name: for a reader; source: to load it.
    cosine: of the base's word embeddings with the teacher's; 1 for the base itself."""

    name: str
    source: str
    factor: float
    cosine: float


def find_start(
    asked: str | None,
    teacher: Any,
    tokenizer: Any,
    factor: float | None,
    preset: str | None,
    layers: int | None = None,
) -> Start | None:
    """The student that stage 2 can start from instead of a freshly converted one.

    asked: a folder or name, which must suit (`DistillError` says what does not); "none"; or None:
    the first of `list_students` that suits, if any. It suits a teacher with its base's sizes and
    vocabulary and with nearly its word embeddings, and a run that asks for its factor or preset and
    for its number of layers (None: the teacher's)."""
    if asked == "none":
        return None
    own = describe_teacher(teacher, tokenizer)
    if asked is not None:
        source = str(find_shipped(asked) or asked)
        report = _report_of(source, asked)
        found = compare_teacher(own, report, factor, preset, layers)
        if isinstance(found, str):
            raise DistillError(
                f"--student {asked}: {found}. Give a student of this teacher's base model and of "
                "the same factor or preset and depth, or --student none."
            )
        name = asked if is_shipped_name(asked) else model_name(asked)
        if name == "student":  # the folder that pretrain-student wrote: its output's name says more
            name = Path(asked).resolve().parent.name
        return Start(name=name, source=source, factor=report["student"]["factor"], cosine=found)
    for student in list_students():
        listed = read_report(student["path"])
        cosine: float | str = "no report"
        if listed:
            cosine = compare_teacher(own, listed, factor, preset, layers)
        if listed and not isinstance(cosine, str):
            return Start(
                name=student["name"],
                source=str(student["path"]),
                factor=listed["student"]["factor"],
                cosine=cosine,
            )
    return None


def compare_teacher(
    own: Mapping[str, Any],
    report: Mapping[str, Any],
    factor: float | None,
    preset: str | None,
    layers: int | None = None,
) -> float | str:
    """The cosine of the word embeddings of a teacher (`describe_teacher`) and of the base in a
    student's report; or, in words, why the student is none for it."""
    base, made = report["teacher"], report["student"]["factor"]
    for key, value in base["sizes"].items():
        if own["sizes"].get(key) != value:
            return f"its teacher has {key} {value}, this one {own['sizes'].get(key)}"
    if own["vocabulary"] != base["vocabulary"]:
        return "its teacher has another vocabulary"
    if preset is not None and report["asked"]["preset"] != preset.lower():
        return f"it was not made with preset {preset}"
    deep = base["sizes"]["num_hidden_layers"]
    has, wanted = report["student"].get("layers", deep), deep if layers is None else layers
    if has != wanted:
        return f"it has {has} layers, {wanted} are asked for"
    if factor is not None and not BELOW * factor <= made <= ABOVE * factor:
        return f"it is {made:.2f} times smaller, {factor:g} is asked for"
    if own["embedding_digest"] == base["embedding_digest"]:
        return 1.0
    mine, theirs = (torch.tensor(x["embedding_sample"], dtype=torch.float64) for x in (own, base))
    cosine = float(torch.nn.functional.cosine_similarity(mine, theirs, dim=0))
    if cosine < ALIKE:
        return f"its teacher's word embeddings differ (cosine {cosine:.3f})"
    return cosine


def student_from(start: Start, teacher: Any, **wanted: Any) -> Any:
    """The teacher's converted twin with the body of the student that ``start`` names.

    Embeddings and layers have that student's shapes and weights. The rest, pooler and head, has the
    teacher's weights: copied, or converted, to that student's shapes where it has the layer (so
    that the sizes add up to what was asked for) and else as a plan with ``wanted`` (factor or
    preset) says."""
    from .checkpoint import load
    from .conversion import convert, plan

    learnt: Any = load(start.source)
    prefix = teacher.base_model_prefix + "."
    own = "" if learnt.base_model is learnt else learnt.base_model_prefix + "."
    rules = {
        prefix + layer.size.name.removeprefix(own): Rule(groups=layer.groups)
        for layer in learnt.kronecker_plan.converted
        if layer.size.name.startswith(own) and not layer.size.tied_to
    }
    body = {
        name: value
        for name, value in learnt.base_model.state_dict().items()
        if not name.startswith(POOLER)
    }
    inner = {prefix + name.rpartition(".")[0] for name in body}
    for layer in plan(teacher, **wanted, errors=False).converted:
        if layer.size.name not in inner:
            rules.setdefault(layer.size.name, Rule(groups=layer.groups))
    student = convert(teacher, rules=rules, keep=())
    put_body(student, body, start.name)
    return student


def put_body(student: Any, body: Mapping[str, Any], name: str) -> None:
    """Load ``body``, the tensors of a learnt base model, into the student's; its pooler stays."""
    left = student.base_model.load_state_dict(body, strict=False)
    if left.unexpected_keys:
        raise DistillError(
            f"{name}: it has {left.unexpected_keys[0]!r}, which the task's model does not. Give "
            "the encoder without its head."
        )
    missing = [key for key in left.missing_keys if not key.startswith(POOLER)]
    if missing:
        raise DistillError(
            f"{name}: it has no {missing[0]!r}, which the task's model needs. Give a student of "
            "the whole encoder."
        )


def _report_of(source: str, asked: str) -> dict[str, Any]:
    """report.json of a student's folder, or of its repository on the hub."""
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            file = cached_file(source, "report.json")
        except (OSError, ValueError) as error:
            raise DistillError(
                f"--student {asked}: no such folder here, and the hub does not give its "
                f"report.json. {known_students(asked)}"
            ) from error
        folder = Path(str(file)).parent
    report = read_report(folder)
    if report is None:
        raise DistillError(
            f"--student {asked}: the folder has no report.json, so its teacher is not known. Give "
            "the folder student/ that `kronbert pretrain-student` wrote."
        )
    return report
