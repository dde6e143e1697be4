"""The main job: teacher, conversion, distillation, evaluation, report; every step is resumable."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from .config import Rule
from .errors import DistillError
from .job_begin import MEASURED, candidates, hidden_error, row_batches
from .job_depth import base_of
from .job_folder import JobFolder, Say, alone
from .job_models import (
    check_finite,
    check_tokenizer,
    classes_said,
    head_of,
    longest,
    open_encoder,
    open_pretrained,
    open_teacher,
    open_tokenizer,
    quiet,
)
from .job_rows import SAVED_LENGTH, check_more_rows, cut_rows, more_rows, open_data
from .job_settings import CompressSettings
from .job_stages import Schedule
from .job_start import Start, find_start, put_body

__all__ = ["CompressSettings", "compress", "open_data", "open_teacher"]


def compress(settings: CompressSettings, say: Say = print, data: Any = None) -> dict[str, Any]:
    """Run the job (or what is left of it) and return the content of report.json.

    data: a `kronbert.distill.data.TaskData` to use instead of settings.task. Raises a
    `KronbertError` before anything is trained when the parts do not go together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DistillError(
            "compress runs in one process. For several, write the stages with DistillTrainer and "
            "start that script with torchrun."
        )
    with alone(settings.output):
        folder = JobFolder(settings.output, asdict(settings), say)
        report = folder.path / "report.json"
        if not (folder.done("report") and report.is_file() and folder.whole("student")):
            folder.forget("report")
            with quiet():
                _Job(settings, folder, data).run()
        else:
            looked = "the data were not read again"
            if data is not None:
                _begin(folder, data)
                looked = "with these data"
            say(f"finished before: {folder.path / 'report.md'} ({looked})")
        content: dict[str, Any] = json.loads(report.read_text())
    return content


def _begin(folder: JobFolder, data: Any, *texts: str | None) -> None:
    """`JobFolder.begin` with these data and text files, or the error that says that it began with
    others."""
    from .distill.digests import data_digest

    sizes = {name: len(rows) for name, rows in data.validation.items()}
    read = {
        name: sha256(Path(name).read_bytes()) for name in texts if name and os.path.isfile(name)
    }
    folder.begin(
        f"{data.source}; {len(data.train)} train, {sizes}",
        data_digest(data),
        {name: seen.hexdigest()[:16] for name, seen in read.items()},
    )


class _Job:
    """The steps of one job; everything that can be wrong is asked in ``__init__``."""

    def __init__(self, settings: CompressSettings, folder: JobFolder, data: Any) -> None:
        from transformers import AutoConfig

        from .distill.data import tokenize
        from .distill.unlabelled import training_rows

        self.settings, self.folder = settings, folder
        self.wanted: dict[str, Any] = {"factor": settings.factor, "preset": settings.preset}
        config = open_pretrained(AutoConfig, settings.model)
        self.data = data or open_data(
            settings.task,
            data_dir=settings.data_dir,
            text_columns=settings.text_columns,
            label_column=settings.label_column,
            regression=settings.regression,
            head=head_of(config),
            limit=settings.limit,
            seed=settings.seed,
        )
        self.task = self.data.task
        self.tokenizer = open_tokenizer(settings.model)
        most = longest(config, self.tokenizer)
        self.schedule = Schedule.of(settings, self.data, config, self.tokenizer, most)
        self.max_length = self.schedule.max_length
        self.dense: Any = None
        if not folder.done("teacher"):
            self.dense = self._open_dense()
            table = self.dense[0].get_input_embeddings().weight.detach()
            check_more_rows(self.data, settings, self.schedule.tokens_wanted, self.tokenizer, table)
        self.rows = tokenize(self.data, self.tokenizer, self.max_length)
        for stage in self.schedule.on_task:
            training_rows(self.rows, stage)  # rows without a label, which the data may have
        self.cut = cut_rows(self.data, self.tokenizer, self.max_length, most)
        self.tokenizer.init_kwargs[SAVED_LENGTH] = self.max_length  # evaluate's default
        if settings.stage1_text and not folder.done("stage1"):
            _ = self.blocks
        if not folder.began():
            folder.state["start"] = self._choose_start()
        folder.state["cut"] = self.cut
        _begin(folder, self.data, settings.unlabelled, settings.stage1_text)

    def _open_dense(self) -> tuple[Any, bool]:
        """The teacher, fit to be compressed and distilled; or the error that says why not."""
        from transformers import set_seed

        from .conversion import plan
        from .distill.checks import supervised_layers
        from .distill.taps import Taps

        name = self.settings.model
        set_seed(self.settings.seed)
        teacher, tuned = open_teacher(name, self.task)
        check_finite(teacher, name, "Use an intact checkpoint.")
        check_tokenizer(teacher, self.tokenizer, name)
        base, wanted = self._base(teacher)
        plan(base, **wanted, errors=False)
        for stage in self.schedule.on_task:
            layers = supervised_layers(base, teacher, stage.objective)
            Taps(teacher, stage.objective.teacher_taps, [layer for layer in layers if layer])
        self.folder.need_space(teacher.num_parameters())
        return teacher, tuned

    def _base(self, teacher: Any) -> tuple[Any, dict[str, Any]]:
        return base_of(teacher, self.settings.layers, self.wanted)

    @cached_property
    def blocks(self) -> Any:
        """The text of stage 1, packed."""
        from .distill.text import load_text, pack_text

        source = self.settings.stage1_text
        assert source is not None  # whoever asks has looked
        text = load_text(source, limit_tokens=self.settings.stage1_words)
        return pack_text(text, self.tokenizer, self.schedule.general.max_length)

    def run(self) -> None:
        from .distill.finetune import CACHE

        folder, settings = self.folder, self.settings
        steps = 3 + len(self.schedule.on_task)
        kinds = "scores" if self.task.labels is None else f"{len(self.task.labels)} classes"
        texts = " and ".join(map(repr, self.task.text)) + f"; label {self.task.label!r}"
        on = f"{self.task.name} ({self.data.source}; texts {texts}; {kinds})"
        what = f"1/{steps} teacher: {settings.model} on {on}"
        if self.cut is not None:
            folder.say(self.cut)
        folder.step("teacher", what, self._teacher)
        if settings.stage1_text:
            what = f"2/{steps} stage 1: general text {settings.stage1_text}"
            folder.step("stage1", what, self._stage1)
        else:
            folder.step("start", f"2/{steps} the student's start", self._begin)
        for number, stage in enumerate(self.schedule.on_task, start=3):
            aim = "hidden states" if stage.name == "intermediate" else "answers"
            what = f"{number}/{steps} stage 2 on {self.task.name}: the teacher's {aim}"
            folder.step(stage.name, what, partial(self._distil, stage))
        shutil.rmtree(folder.path / CACHE, ignore_errors=True)
        folder.step("report", f"{steps}/{steps} report", self._report)

    def _teacher(self) -> dict[str, Any]:
        from .distill.finetune import commonest_class

        teacher, tuned = self.dense
        self.dense = None
        history: list[dict[str, Any]] = []
        if tuned:
            said = classes_said(teacher.config, self.task)
            self.folder.say(f"fine-tuned already, taken as it is{said}")
        else:
            history = self._fine_tune(teacher)
        scores = self._scores(teacher, "teacher", "--teacher-learning-rate")
        self.folder.save_model(teacher, self.tokenizer, "teacher")
        commonest = commonest_class(self.rows)
        self._say_worthless(scores, commonest)
        result = {
            "scores": scores,
            "commonest": commonest,
            "fine_tuned_here": not tuned,
            "history": history,
        }
        return result if tuned else {**result, "stage": self.schedule.for_teacher.to_dict()}

    def _fine_tune(self, teacher: Any) -> list[Any]:
        """On the labels; on standardised scores, where the head can then be given their unit."""
        from .distill.score_head import output_layer
        from .distill.score_scale import standardised, take_unit

        rows = replace(self.rows, unlabelled=None)
        if self.schedule.scale is None or output_layer(teacher) is None:
            return self._train(teacher, None, self.schedule.for_teacher, rows, "teacher")
        rows = standardised(rows, *self.schedule.scale)
        history = self._train(teacher, None, self.schedule.for_teacher, rows, "teacher")
        take_unit(teacher, *self.schedule.scale)
        return history

    def _say_worthless(self, scores: Any, commonest: Any) -> None:
        name, metric = next(iter(scores)), self.task.primary
        score, least = scores[name][metric], commonest[name][metric] if commonest else 0.0
        if score <= least:
            who = "a constant answer" if commonest is None else "the commonest class"
            self.folder.say(
                f"the teacher has learnt nothing that shows: {metric} {score:.3f} on {name}, {who} "
                f"{least:.3f}. Look at its rows, their length (--max-length), the order of its "
                "classes and its training."
            )

    def _stage1(self) -> dict[str, Any]:
        """The pre-trained model teaches, with its masked-LM head, where the checkpoint has one (the
        paper's stage 1); else the fine-tuned teacher. The task head is the fine-tuned teacher's."""
        from .conversion import convert

        teacher = self._saved("teacher")
        base, wanted = self._base(teacher)
        student = convert(base, **wanted)
        if self.schedule.masked:
            history = self._learn_masked(student)
        else:
            history = self._train(student, teacher, self.schedule.general, self.blocks, "stage1")
        check_finite(student, "the student", "Try a lower --stage1-learning-rate.")
        self.folder.save_model(student, self.tokenizer, "stage1")
        return {
            "history": history,
            "blocks": len(self.blocks),
            "stage": self.schedule.general.to_dict(),
        }

    def _learn_masked(self, student: Any) -> list[Any]:
        """Stage 1 between the pre-trained masked LM and its twin of the student's shapes, whose
        body is then the student's."""
        from .conversion import convert

        general = open_encoder(self.settings.model, masked=True)
        names = {name for name, _ in general.named_modules()}
        rules = {
            layer.size.name: Rule(groups=layer.groups)
            for layer in student.kronecker_plan.converted
            if layer.size.name in names and not layer.size.tied_to
        }
        base, _ = base_of(general, self.settings.layers, {})
        learner = convert(base, rules=rules, keep=())
        history = self._train(learner, general, self.schedule.general, self.blocks, "stage1")
        body: dict[str, Any] = learner.base_model.state_dict()  # type: ignore[union-attr]
        put_body(student, body, self.settings.model)
        return history

    def _choose_start(self) -> dict[str, Any] | None:
        """Chosen once, before anything is trained, and kept when the run is resumed."""
        settings = self.settings
        if settings.stage1_text is not None or self.dense is None:
            return None
        asked: dict[str, Any] = self.wanted | {"layers": settings.layers}
        found = find_start(settings.student, self.dense[0], self.tokenizer, **asked)
        return None if found is None else asdict(found)

    @property
    def start(self) -> Start | None:
        chosen = self.folder.state.get("start")
        return None if chosen is None else Start(**chosen)

    def _begin(self) -> dict[str, Any]:
        """The student that was asked for, or the nearer one of a fitted one and a shipped one: a
        base model's student may be far from the fine-tuned teacher."""
        settings, start, teacher = self.settings, self.start, self._saved("teacher")
        rows, seed = self.rows.train, settings.seed
        base, wanted = self._base(teacher)
        found = candidates(
            base,
            start,
            wanted,
            rows,
            self.tokenizer,
            fitted=start is None or settings.student is None,
            seed=seed,
        )
        fresh = row_batches(rows, MEASURED, seed + 1, self.tokenizer)
        errors = {name: hidden_error(student, teacher, fresh) for name, student in found.items()}
        chosen = min(errors, key=lambda name: errors[name])
        for name, error in errors.items():
            said = "taken" if name == chosen else "left"
            self.folder.say(f"{name}: {error:.3f} from the teacher's hidden states, {said}")
        self.folder.save_model(found[chosen], self.tokenizer, "start")
        told = None
        if start is not None and chosen == start.name:
            told = {"name": start.name, "cosine": start.cosine}
        return {"history": [], "hidden_errors": errors, "start": told}

    def _distil(self, stage: Any) -> dict[str, Any]:
        names = ["stage1" if self.settings.stage1_text else "start"]
        names += [one.name for one in self.schedule.on_task]
        before, after = names[names.index(stage.name) - 1], stage.name
        student, teacher = self._saved(before), self._saved("teacher")
        rows, result = self.stage2_rows, {}
        if stage is self.schedule.on_task[0]:
            who = "student before stage 2"
            result["scores_before"] = self._scores(student, who, "--stage1-learning-rate")
        history = self._train(student, teacher, stage, rows, after)
        scores = self._scores(student, "student", "--learning-rate")
        last = stage is self.schedule.on_task[-1]
        self.folder.save_model(student, self.tokenizer, "student" if last else after)
        return {
            **result,
            "scores": scores,
            "rows": rows.source,
            "history": history,
            "stage": stage.to_dict(),
        }

    @cached_property
    def stage2_rows(self) -> Any:
        """The task's rows, and those without a label that the recipe or the settings add."""
        from .distill.data import tokenize

        table = self._saved("teacher").get_input_embeddings().weight.detach()
        wanted = self.schedule.tokens_wanted
        more = more_rows(self.data, self.settings, wanted, self.tokenizer, table)
        if more is self.data:
            return self.rows
        return tokenize(more, self.tokenizer, self.max_length)

    def _report(self) -> dict[str, Any]:
        from .distill.finetune import answers
        from .job_report import write_report

        student, teacher = self._saved("student"), self._saved("teacher")
        own, theirs = (answers(model, self.rows, self.tokenizer) for model in (student, teacher))
        for model in (student, teacher):
            model.to("cpu")  # where the report times it
        state, source = self.folder.state, self.data.source
        base, _ = base_of(teacher, self.settings.layers, {})
        write_report(
            self.folder.path,
            state,
            self.task,
            source,
            (own, theirs),
            student,
            teacher,
            base,
            longest(teacher.config, self.tokenizer),
        )
        return {}

    def _train(self, model: Any, teacher: Any, stage: Any, rows: Any, step: str) -> list[Any]:
        from .distill.finetune import run_stage

        self.folder.need_space(model.num_parameters())
        return run_stage(
            model,
            teacher,
            stage,
            rows,
            self.folder.run_of(step),
            tokenizer=self.tokenizer,
            precision=self.settings.precision,
            keep_last=True,
            say=self.folder.say,
        )

    def _scores(self, model: Any, who: str, option: str) -> dict[str, dict[str, float]]:
        from .distill.finetune import evaluate

        scores = evaluate(model, self.rows, self.tokenizer)
        if any(math.isnan(value) for values in scores.values() for value in values.values()):
            raise DistillError(
                f"the {who} gives NaN or infinity: its training diverged. Try a lower {option}, "
                "in another --output."
            )
        return scores

    def _saved(self, name: str) -> Any:
        from transformers import AutoModelForSequenceClassification as Auto

        self.folder.need(name)
        return open_pretrained(Auto, str(self.folder.path / name))
