"""One run of the GLUE study: its training and its result."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import study_settings as settings  # type: ignore[import-not-found]
import study_students as students  # type: ignore[import-not-found]
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from study_data import Rows, rows_of  # type: ignore[import-not-found]
from study_folders import Busy, Run, locked  # type: ignore[import-not-found]
from study_provenance import provenance  # type: ignore[import-not-found]
from study_scores import score_again, scored  # type: ignore[import-not-found]
from transformers import set_seed

from kronbert.distill import (
    Stage,
    search_rates,
)
from kronbert.distill.checkpoints import last_checkpoint
from kronbert.distill.data import TaskData
from kronbert.distill.finetune import (
    commonest_class,
    labels_only,
    run_stage,
    states_of,
    use_bf16,
)
from kronbert.distill.teacher_cache import model_digest, with_teacher
from kronbert.distill.unlabelled import training_rows
from kronbert.errors import DistillError
from kronbert.job_folder import write_whole
from kronbert.job_models import check_finite, model_name, open_model, open_teacher, open_tokenizer
from kronbert.pretrain import half_weights

RESULT, ASKED, RATES = "result.json", "asked.json", "rates.json"
BEFORE_LAST = "before-last.safetensors"
OUTPUTS = "teacher-outputs"


class Study:
    """Makes teachers and students below ``options.output``, each once."""

    def __init__(self, options: Any) -> None:
        self.options, self.output = options, Path(options.output)
        self.changes = settings.read_changes(options.stage)
        self.tokenizer = open_tokenizer(options.model)
        self.rows = Rows(options, self.tokenizer)
        self.failed: set[Run] = set()

    def done(self, run: Run) -> bool:
        """Whether the run's result is there; `DistillError` if it was made with other settings."""
        path = run.folder(self.output) / RESULT
        if not path.is_file():
            return False
        if not self.options.only_missing:
            self._same(json.loads(path.read_text())["asked"], run, path)
        return True

    def make(self, run: Run) -> dict[str, Any]:
        """The run's result: from its folder, or made now, from its last checkpoint on.

        Raises `Busy` where another process makes it, or what it needs."""
        folder = run.folder(self.output)
        if not self.done(run):
            with locked(folder, own=True):
                if not self.done(run):  # finished by another process meanwhile
                    asked = self.asked(run)
                    before = folder / ASKED
                    if before.is_file():
                        self._same(json.loads(before.read_text()), run, before)
                    write_whole(before, json.dumps(asked, indent=1) + "\n")
                    teacher = run.kind == "teacher"
                    result = self._teacher(run) if teacher else self._student(run)
                    content = {**self._about(run), **result, "asked": asked}
                    write_whole(folder / RESULT, json.dumps(content, indent=1) + "\n")
                shutil.rmtree(folder / "run", ignore_errors=True)
        found: dict[str, Any] = json.loads((folder / RESULT).read_text())
        return found

    def score_again(self, run: Run) -> dict[str, Any]:
        """A finished run's scores, from its saved model."""
        folder = run.folder(self.output)
        teacher = None if run.kind == "teacher" else self.teacher_folder(run.task)
        with locked(folder, own=True):
            data = self.rows.tokens(run.task)
            commit = provenance(self.options.commit)["commit"]
            return score_again(folder / RESULT, self.rows, data, self.tokenizer, teacher, commit)

    def asked(self, run: Run) -> dict[str, Any]:
        """What determines the run's result, apart from the code."""
        told: dict[str, Any] = {
            "model": model_name(self.options.model),
            "limit": self.options.limit,
            "seed": run.seed,
            "data_digest": self.rows.digest(run.task),
        }
        if run.kind == "teacher":
            if run.task in settings.WITH_SNLI and self.options.snli_dir is not None:
                told["snli"] = True
            return {**told, "seed": self.teacher_seed(run.task), **settings.teacher_of(run.task)}
        training = self.training(run.task).to_dict()
        return {**told, "training": training, "changes": self.changes}

    def training(self, task: str) -> Any:
        """How the students of a task are made and trained."""
        return settings.training_of(task, self.changes, self.rows.count(task))

    def teacher_seed(self, task: str) -> int:
        return int(settings.teacher_of(task)["seed"])

    def _same(self, before: dict[str, Any], run: Run, path: Path) -> None:
        if "training" in before:
            before = {**before, "training": settings.completed(before["training"])}
        now = json.loads(json.dumps(self.asked(run)))
        before = {"data_digest": now["data_digest"], **before}  # an earlier one has none
        if before != now:
            other = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            raise DistillError(
                f"{path}: made with other settings ({', '.join(other)}). Remove the folder, name "
                "the variant with --tag, or keep it as it is with --only-missing."
            )

    def _about(self, run: Run) -> dict[str, Any]:
        about: dict[str, Any] = {"task": run.task, "student": run.kind}
        if run.kind != "teacher":
            about |= {"factor": run.factor, "seed": run.seed, "tag": run.tag}
        precision = "bf16" if use_bf16("auto") else "fp32"
        return {**about, **provenance(self.options.commit), "precision": precision}

    def _teacher(self, run: Run) -> dict[str, Any]:
        folder, row = run.folder(self.output), settings.teacher_of(run.task)
        data = self.rows.of_teacher(run.task)
        start = row.pop("start")
        stage = Stage(name="teacher", objective=labels_only(), **row)
        set_seed(stage.seed)  # of the new head
        model, tuned = open_teacher(self.options.model, data.task)
        if tuned:
            raise DistillError(f"--model {self.options.model}: fine-tuned; give its base model.")
        if start is not None:
            other = open_model(str(self.teacher_folder(start)))
            model.base_model.load_state_dict(other.base_model.state_dict())
        began = monotonic()
        history, resumed = self.train(model, None, [stage], data, folder / "run")
        model.to("cpu").save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        return {
            **scored(model, self.rows, data, self.tokenizer),
            "commonest": commonest_class(data),
            "digest": model_digest(model)[:16],
            "parameters": model.num_parameters(),
            "start": start,
            "stages": [stage.to_dict()],
            "history": history,
            "rows": len(data.train),
            "seconds": round(monotonic() - began, 1),
            "resumed": resumed,
        }

    def teacher_folder(self, task: str) -> Path:
        """The task's teacher; made if need be."""
        run = Run(task=task, kind="teacher")
        if run in self.failed:
            raise DistillError(f"its teacher ({task}) could not be made.")
        try:
            self.make(run)
        except Busy as busy:
            raise Busy(run.folder(self.output), own=False) from busy
        return run.folder(self.output) / "model"

    def _student(self, run: Run) -> dict[str, Any]:
        folder = run.folder(self.output)
        teacher = open_model(str(self.teacher_folder(run.task)))
        teacher.to("cuda" if torch.cuda.is_available() else "cpu")
        training = self.training(run.task)
        data = self.rows.tokens(run.task, training)
        before = self.before_last(run, training, teacher)
        rate, search = self.rate(run, teacher, training, data)
        began = monotonic()
        student, start = self.begin(run, teacher, training, data)
        init = training.init if getattr(student, "data_fit", None) is not None else "weights"
        parameters = student.num_parameters()
        stages = training.stages_of(run.kind, run.seed)
        stages = [*stages[:-1], replace(stages[-1], learning_rate=rate)]
        if self.options.cache_teacher:
            stages = [replace(one, cache_teacher=True) for one in stages]
        if before is not None:
            student.load_state_dict(load_file(before))
            init = json.loads((before.parent / RESULT).read_text())["init"]
        own = stages if before is None else stages[-1:]
        history, resumed = self.train(student, teacher, own, data, folder / "run")
        seconds = round(monotonic() - began, 1)
        check_finite(student, "diverged", "Try lower rates.")
        student.load_state_dict(half_weights(student))  # scored as saved
        scores = scored(student, self.rows, data, self.tokenizer, teacher)
        if not self.options.no_models:
            student.to("cpu").save_pretrained(folder / "model", state_dict=half_weights(student))
            self.tokenizer.save_pretrained(folder / "model")
            if len(own) > 1:
                shutil.copyfile(
                    folder / "run" / f"{own[-2].name}.safetensors", folder / BEFORE_LAST
                )
        return {
            **scores,
            "parameters": parameters,
            "teacher_parameters": teacher.num_parameters(),
            "measured_factor": teacher.num_parameters() / parameters,
            "teacher_digest": model_digest(teacher)[:16],
            "start": start,
            "init": start["name"] if start else init,
            "shapes": students.shapes_of(student),
            "stages": [stage.to_dict() for stage in stages],
            "search": search,
            "history": history,
            "rows": len(data.train) + len(data.unlabelled or ()),
            "seconds": seconds,
            "resumed": resumed,
        }

    def before_last(self, run: Run, training: Any, teacher: Any) -> Path | None:
        """The weights of another tag's run that this one goes on from, if any."""
        if training.after is None:
            return None
        source = replace(run, tag=training.after)
        folder = source.folder(self.output)
        if not ((folder / RESULT).is_file() and (folder / BEFORE_LAST).is_file()):
            raise DistillError(
                f"{run}: goes on from {source} before its last stage, which is not there. Make "
                "that run first, with the same --output, two stages and without --no-models."
            )
        result = json.loads((folder / RESULT).read_text())
        told, asked = result["asked"], self.asked(run)
        theirs = settings.before_last(settings.completed(told["training"]))
        ours = settings.before_last(training.to_dict())
        theirs |= {key: told[key] for key in ("model", "limit")}
        ours |= {key: asked[key] for key in ("model", "limit")}
        theirs["teacher"], ours["teacher"] = result["teacher_digest"], model_digest(teacher)[:16]
        if other := [key for key in ours if theirs[key] != ours[key]]:
            raise DistillError(
                f"{run}: after={training.after!r}, but {source} was made otherwise before its last "
                f"stage ({', '.join(other)}). Leave these as they were there, or make it anew."
            )
        return folder / BEFORE_LAST

    def begin(
        self, run: Run, teacher: Any, training: Any, data: TaskData
    ) -> tuple[Any, dict[str, Any] | None]:
        """The untrained student, and what it goes on from, if anything."""
        set_seed(run.seed)
        teacher.requires_grad_(True)  # a search before froze it, and a student copies that
        if training.start is not None:
            source = replace(run, task=training.start)
            if not self.done(source):
                raise DistillError(
                    f"{run}: goes on from {source}, which is not there. Run that task first, with "
                    "the same --output and --tag."
                )
            folder = source.folder(self.output) / "model"
            return students.continued(teacher, folder), {"name": f"student of {training.start}"}
        start = students.stage1_start(
            self.options.stage1, teacher, self.tokenizer, run.factor, run.kind
        )
        calibration = None
        if students.is_fitted(run.kind, training.init) and training.after is None:
            calibration = students.calibration(
                data.train,
                training.calibration_rows,
                run.seed,
                self.tokenizer,
                self.rows.text(data, training.calibration_text),
            )
        counted = training.init == "importance"
        student = students.build(
            run.kind,
            teacher,
            run.factor,
            start,
            calibration,
            training.structure,
            counted,
            training.layers,
        )
        return student, None if start is None else {"name": start.name, "cosine": start.cosine}

    def rate(
        self, run: Run, teacher: Any, training: Any, data: TaskData
    ) -> tuple[float, dict[str, Any] | None]:
        """The learning rate of the last stage, and the search that found it, once for all seeds."""
        stages = training.stages_of(run.kind, settings.SEARCH_SEED)
        if len(training.rates) < 2:
            return (training.rates or (stages[-1].learning_rate,))[0], None
        folder = run.rates_folder(self.output)
        with locked(folder, own=False):
            before = folder / RATES
            told = {"training": training.to_dict(), "teacher": model_digest(teacher)[:16]}
            if before.is_file():
                saved = json.loads(before.read_text())
                if saved["of"] != told and not self.options.only_missing:
                    raise DistillError(
                        f"{before}: searched with other settings. Remove the folder."
                    )
                return saved["search"]["learning_rate"], saved["search"]
            # Only reported seeds have a student to go on from.
            seed = settings.SEARCH_SEED if training.start is None else self.options.seeds[0]
            student, _ = self.begin(replace(run, seed=seed), teacher, training, data)
            self.train(student, teacher, stages[:-1], data, folder / "run")
            student.to("cpu")
            rows = rows_of(stages[-1], data)
            with self.cached(stages[-1], student, teacher, rows) as cache:
                search = search_rates(
                    student,
                    teacher,
                    stages[-1],
                    rows,
                    folder,
                    training.rates,
                    tokenizer=self.tokenizer,
                    share=training.share,
                    cache=cache,
                    disable_tqdm=True,
                    logging_strategy="no",
                    eval_strategy="no",  # it scores each rate itself, at the end
                ).to_dict()
            write_whole(before, json.dumps({"of": told, "search": search}, indent=1) + "\n")
            shutil.rmtree(folder / "run", ignore_errors=True)
        return search["learning_rate"], search

    def train(
        self, model: Any, teacher: Any, stages: list[Stage], data: TaskData, folder: Path
    ) -> tuple[list[dict[str, Any]], bool]:
        """Through all stages, from where an interrupted run was; evaluations, and whether so."""
        history: list[dict[str, Any]] = []
        resumed = False
        for stage in stages:
            place, finished = folder / stage.name, folder / f"{stage.name}.safetensors"
            if finished.is_file():
                model.load_state_dict(load_file(finished))
                history += json.loads(finished.with_suffix(".json").read_text())
                resumed = True
                continue
            resumed = resumed or last_checkpoint(place, averaged=stage.ema is not None) is not None
            rows = rows_of(stage, data)
            with self.cached(stage, model, teacher, rows) as cache:
                log = run_stage(
                    model,
                    teacher,
                    stage,
                    rows,
                    place,
                    tokenizer=self.tokenizer,
                    cache=cache,
                    keep_last=True,
                    disable_tqdm=not sys.stderr.isatty(),
                    logging_strategy="no",  # evaluations are logged all the same
                )
            scored = [{"stage": stage.name, **row} for row in log if "eval_loss" in row]
            history += scored
            write_whole(finished.with_suffix(".json"), json.dumps(scored))
            part = finished.with_suffix(".part")
            save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, part)
            os.replace(part, finished)
            shutil.rmtree(place)
        return history, resumed

    @contextmanager
    def cached(self, stage: Stage, student: Any, teacher: Any, data: TaskData) -> Iterator[Path]:
        """The folder with what ``stage`` reads of the teacher; one process computes it."""
        folder = self.output / data.task.name / OUTPUTS
        if stage.cache_teacher:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                with_teacher(
                    training_rows(data, stage),
                    teacher,
                    folder,
                    tokenizer=self.tokenizer,
                    layers=states_of(student, teacher, stage),
                    device="cuda" if torch.cuda.is_available() else "cpu",
                    autocast=torch.bfloat16 if use_bf16("auto") else None,
                )
        yield folder
