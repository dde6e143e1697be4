"""Stage 1 alone: a student of the bare encoder, distilled on general text, for any later task."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from .errors import DataError, DistillError, PlanError
from .job_depth import at_depth, base_of
from .job_folder import JobFolder, Say, alone, write_whole
from .job_models import (
    check_finite,
    check_tokenizer,
    longest,
    masked_lm_saved,
    model_name,
    open_encoder,
    open_pretrained,
    open_tokenizer,
    quiet,
)
from .job_settings import check_numbers, text_for_paths
from .sentence_files import copy_pooling
from .shipped import find_shipped
from .student_card import student_card, student_report

__all__ = ["PretrainSettings", "pretrain_student"]


CALIBRATION = 64
"""Blocks that the first student is fitted to: 8,192 tokens at 128 a block."""


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """What `kronbert pretrain-student` is asked for.

    model: hub name or folder of the encoder that teaches; teacher_name: what the report calls it.
    text, valid: as `kronbert.distill.text.load_text` takes them; valid: held-out text, of which
    valid_blocks evenly spaced blocks are measured. factor, preset, rules: as in `kronbert.convert`.
    layers: how many of the model's the student has, as `kronbert.fewer_layers` takes it; factor
    counts against the model all the same. None: all.
    student: a saved student of this teacher to go on from, instead of the nearest products.
    init: "data" fits the first student to what the teacher's layers give on CALIBRATION blocks of
    the text, "weights" to their weights alone; see `kronbert.convert`.
    words: stop reading text after so many. optimizer: "adamw" for AdamW alone. mlm: train the
    masked-LM head too; None: where the checkpoint has one. sentences: learn the embeddings of the
    text's sentences (means over tokens), as a sentence encoder gives them, instead of packed
    blocks; best after a run without, whose student ``student`` names. half: save float16 weights.
    licence: of the student, for its model card.
    None otherwise: what `general_stage` or `sentence_stage` of the recipe kronbert have."""

    model: str
    text: str
    output: str
    teacher_name: str | None = None
    factor: float | None = None
    preset: str | None = None
    rules: Mapping[str, Any] | None = None
    layers: int | None = None
    student: str | None = None
    init: Literal["weights", "data"] = "data"
    valid: str | None = None
    valid_blocks: int = 128
    words: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    optimizer: Literal["adamw", "muon"] = "muon"
    batch_size: int | None = None
    max_length: int | None = None
    mlm: bool | None = None
    sentences: bool = False
    precision: str = "auto"
    half: bool = False
    licence: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        text_for_paths(self)
        check_numbers(self, "pretrain-student")
        if self.factor is not None and self.preset is not None:
            raise PlanError("pretrain-student: factor= and preset=: expected one of them.")
        if self.optimizer not in ("adamw", "muon"):
            raise DistillError(
                f"pretrain-student: optimizer={self.optimizer!r}: expected 'adamw' or 'muon'."
            )
        shapes = self.factor or self.preset or self.rules
        if self.student is not None and (shapes or self.layers is not None):
            raise PlanError(
                "pretrain-student: student= has its layers and shapes; give it without factor=, "
                "preset=, rules= and layers=."
            )
        if self.sentences and self.mlm:
            raise DistillError(
                "pretrain-student: sentences= and mlm=: no word of a sentence is masked whose "
                "embedding is learnt. Give one of the two."
            )
        if self.student is None and not shapes:
            raise PlanError(
                "pretrain-student: expected factor=, preset=, rules= or student=. Try --factor 8."
            )


def pretrain_student(settings: PretrainSettings, say: Say = print) -> dict[str, Any]:
    """Distil a student on packed text, or what is left of it; the content of report.json.

    Writes student/ (safetensors, config, tokenizer, report.json, README.md), report.json and, with
    valid=, curve.json and curve.png. A killed run is resumed from the same folder, to the same
    weights as without the interruption.

    The text is held packed, 5 bytes of memory per token. Reading and packing it takes more: 420 MB
    at the peak, and 70 s of one core, for 11.4 M tokens of Wikipedia in a 53 MB file. words= limits
    what is packed, and lets a hub set be streamed; files are read whole. A pooler that the
    checkpoint has is converted with the rest, but learns nothing: no term reads it. Raises a
    `KronbertError` before anything is trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DistillError(
            "pretrain-student runs in one process. For several, write the stage with "
            "DistillTrainer and start that script with torchrun."
        )
    with alone(settings.output):
        folder = JobFolder(settings.output, asdict(settings), say)
        report = folder.path / "report.json"
        if folder.done("report") and report.is_file() and folder.whole("student"):
            say(f"finished before: {report} (the text was not read again)")
        else:
            folder.forget("report")
            with quiet():
                _Pretraining(settings, folder).run()
    content: dict[str, Any] = json.loads(report.read_text())
    return content


class _Pretraining:
    """The steps; everything that can be wrong is asked in ``__init__``."""

    def __init__(self, settings: PretrainSettings, folder: JobFolder) -> None:
        from transformers import AutoConfig

        from .distill.checks import has_masked_lm
        from .distill.digests import rows_digest
        from .distill.sentences import check_pooling

        self.settings, self.folder = settings, folder
        self.config = open_pretrained(AutoConfig, settings.model)
        self.tokenizer = open_tokenizer(settings.model)
        has_head = has_masked_lm(self.config, self.tokenizer) and masked_lm_saved(settings.model)
        if settings.mlm and not has_head:
            raise DistillError(
                f"mlm=True: {settings.model} has no masked-LM head, or its tokenizer no mask. "
                "Leave mlm out: the intermediate terms teach the encoder."
            )
        self.mlm = has_head if settings.mlm is None else settings.mlm
        if settings.sentences:
            check_pooling(settings.model)
            self.mlm = False
        self.stage = self._make_stage()
        if not folder.done("train"):
            self.teacher = open_encoder(settings.model, masked=self.mlm)
            check_finite(self.teacher, settings.model, "Use an intact checkpoint.")
            check_tokenizer(self.teacher, self.tokenizer, settings.model)
            self.student = self._make_student()
            folder.need_space(self.student.num_parameters())
        rows, held_out = self.rows, self.held_out
        kind = "sentences of at most" if settings.sentences else "blocks of"
        said = f"{len(rows)} {kind} {self.stage.max_length} tokens"
        if held_out is not None:
            said += f", {len(held_out)} held out"
        texts = {} if held_out is None else {"valid": rows_digest(held_out)[:16]}
        folder.begin(said, rows_digest(rows)[:16], texts)

    def _make_stage(self) -> Any:
        from .distill.finetune import use_bf16
        from .distill.recipes.kronbert import general_stage, sentence_stage

        settings = self.settings
        use_bf16(settings.precision)
        most = longest(self.config, self.tokenizer)
        if settings.max_length is not None and settings.max_length > most:
            raise DataError(
                f"max_length={settings.max_length}: {settings.model} takes {most} tokens at most."
            )
        length = min(128, most) if settings.max_length is None else settings.max_length
        if settings.sentences:
            stage = sentence_stage(max_length=length)
        else:
            stage = general_stage(mlm=self.mlm, max_length=length)
        if settings.optimizer == "adamw":
            stage = replace(stage, muon_rate=None)
        stage = at_depth(stage)
        asked: dict[str, Any] = {
            "epochs": settings.epochs,
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "seed": settings.seed,
        }
        return replace(stage, **{key: value for key, value in asked.items() if value is not None})

    def _make_student(self) -> Any:
        from .checkpoint import load
        from .conversion import convert
        from .job_start import compare_teacher, describe_teacher

        settings = self.settings
        if settings.student is None:
            asked = {"factor": settings.factor, "preset": settings.preset}
            base, wanted = base_of(self.teacher, settings.layers, asked)
            return convert(
                base,
                **wanted,
                rules=settings.rules,
                init=settings.init,
                calibration=self._calibration() if settings.init == "data" else None,
            )
        student: Any = load(settings.student)
        mine, own = type(student).__name__, type(self.teacher).__name__
        if mine != own:
            raise DistillError(
                f"student={settings.student}: a {mine}, but its teacher would be a {own}. Give one "
                "that pretrain-student wrote from this model with the same mlm=."
            )
        check_finite(student, settings.student, "Use an intact checkpoint.")
        if (before := self._before()) is not None:
            own_base = describe_teacher(self.teacher, self.tokenizer)
            layers = before["student"].get("layers")
            found = compare_teacher(own_base, before, None, None, layers)
            if isinstance(found, str):
                raise DistillError(
                    f"student={settings.student}: {found}. Give one that pretrain-student wrote "
                    "from this model, or this student's own base model."
                )
        return student

    def _calibration(self) -> list[dict[str, Any]]:
        import torch

        from .distill.held_out import sample_rows
        from .job_begin import FIT, row_batches

        if self.settings.sentences:
            return row_batches(self.rows, FIT, self.settings.seed, self.tokenizer)
        rows = sample_rows(self.rows, CALIBRATION)["input_ids"]
        return [{"input_ids": part} for part in torch.tensor(rows).split(8)]

    @cached_property
    def rows(self) -> Any:
        """What the student learns from: packed blocks of text, or its sentences."""
        return self._rows(self.settings.text, self.settings.words)

    @cached_property
    def held_out(self) -> Any:
        from .distill.held_out import sample_rows

        if self.settings.valid is None:
            return None
        return sample_rows(self._rows(self.settings.valid, None), self.settings.valid_blocks)

    def _rows(self, source: str, words: int | None) -> Any:
        from .distill.sentences import sentence_rows
        from .distill.text import load_text, pack_text

        text = load_text(source, limit_tokens=words)
        make = sentence_rows if self.settings.sentences else pack_text
        return make(text, self.tokenizer, self.stage.max_length)

    def run(self) -> None:
        name = model_name(self.settings.model)
        what = f"1/2 distilling a student of {name}: {self.folder.state['data']}"
        self.folder.step("train", what, self._train)
        self.folder.need("student")
        self.folder.step("report", "2/2 report", self._report)

    def _train(self) -> dict[str, Any]:
        from .distill.checkpoints import last_checkpoint, step_of
        from .distill.finetune import run_stage
        from .job_start import describe_teacher

        settings, folder = self.settings, self.folder
        run = folder.run_of("train")
        last = last_checkpoint(run)
        done = step_of(last) if last else 0
        teacher = describe_teacher(self.teacher, self.tokenizer)
        start = monotonic()
        history = run_stage(
            self.student,
            self.teacher,
            self.stage,
            self.rows,
            run,
            tokenizer=self.tokenizer,
            precision=settings.precision,
            keep_last=True,
            held_out=self.held_out,
            say=folder.say,
            train_sampling_strategy="group_by_length" if settings.sentences else "random",
        )
        seconds, steps = monotonic() - start, history[-1]["step"]
        student = self.student.to("cpu").float()
        check_finite(student, "the student", "Try a lower --learning-rate in another --output.")
        how = {"state_dict": half_weights(student)} if settings.half else {}
        folder.save_model(student, self.tokenizer, "student", **how)
        copy_pooling(settings.model, folder.path / "student")
        return {
            "asked": self._asked(),
            "before": self._short_before(),
            "teacher": {"name": settings.teacher_name or model_name(settings.model)} | teacher,
            "student": {
                "class": type(student).__name__,
                "parameters": student.num_parameters(),
                "layers": student.config.num_hidden_layers,
                "factor": self.teacher.num_parameters() / student.num_parameters(),
                "dtype": "float16" if settings.half else "float32",
            },
            "steps": steps,
            "steps_of_last_start": steps - done,
            "tokens": self._tokens_read(steps),
            "tokens_of_last_start": self._tokens_read(steps) - self._tokens_read(done),
            "training_seconds": round(seconds, 2),
            "stage": self.stage.to_dict(),
            "history": history,
        }

    def _tokens_read(self, steps: int) -> int:
        """In so many steps, of which the last one of every pass may be a smaller one; of sentences
        in a part of a pass, on average."""
        from .distill.data import row_lengths

        rows, batch = len(self.rows), self.stage.batch_size
        passes, rest = divmod(steps, -(-rows // batch))
        each = float(self.stage.max_length)
        if self.settings.sentences:
            each = sum(row_lengths(self.rows)) / rows
        return round((passes * rows + rest * batch) * each)

    def _asked(self) -> dict[str, Any]:
        """factor and preset, those of the run that began where this one goes on."""
        before = self._before()
        if before is not None:
            asked: dict[str, Any] = before["asked"]
            return asked
        return {"factor": self.settings.factor, "preset": self.settings.preset}

    def _short_before(self) -> dict[str, Any] | None:
        """`_before` without what this run's own report says of the teacher, and without the log."""
        before = self._before() or {}
        return {k: v for k, v in before.items() if k not in ("history", "teacher")} or None

    def _before(self) -> dict[str, Any] | None:
        """The report of the run that made the student that this one goes on from; None where there
        is no report."""
        if self.settings.student is None:
            return None
        name = self.settings.student
        report = Path(find_shipped(name) or name, "report.json")
        if not report.is_file():
            return None
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    def _report(self) -> dict[str, Any]:
        from .distill.held_out import curve_of
        from .pictures import learning_curve

        path, found = self.folder.path, self.folder.state["steps"]["train"]
        content = student_report(asdict(self.settings), found, self.folder.state["data"])
        curve = curve_of(found["history"])
        if curve:
            content["held_out"] = {"start": curve[0], "end": curve[-1]}
            about = {"data": self.folder.state["data"], "points": curve}
            write_whole(path / "curve.json", json.dumps(about, indent=1) + "\n")
            learning_curve(curve, path / "curve.png", text="held-out")
        text = json.dumps(content, indent=1) + "\n"
        write_whole(path / "student" / "README.md", student_card(content))
        write_whole(path / "student" / "report.json", text)
        write_whole(Path(path, "report.json"), text)
        return {}


def half_weights(model: Any) -> dict[str, Any]:
    """The model's tensors as float16, to be saved beside a config that says float32.

    transformers (read and tried in 5.23) loads into config.json's ``dtype`` unless another is
    asked for, so such a folder is half as large and gives a float32 model."""
    found = {}
    for name, value in model.state_dict().items():
        half = value.half() if value.is_floating_point() else value
        if not half.isfinite().all():
            raise DistillError(
                f"half=True: {name!r} has values above 65504, float16's largest. Save float32."
            )
        found[name] = half
    return found
