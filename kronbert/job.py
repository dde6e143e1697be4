"""The main job: teacher, conversion, distillation, evaluation, report; every step is resumable."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .config import check_factor
from .errors import CheckpointError, DataError, DistillError, KronbertError, PlanError, near

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """What `kronbert compress` is asked for.

    model: hub name or folder, with a task head fine-tuned for the task or without one. task: a GLUE
    name or a folder of tables. factor or preset: as in `kronbert.convert`. None: the recipe's value
    (KroneckerBERT), or, for the teacher, 1e-4 below 512 hidden units and 3e-5 from there on."""

    model: str
    task: str
    output: str
    factor: float | None = None
    preset: str | None = None
    data_dir: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    stage1_text: str | None = None
    stage1_words: int | None = None
    stage1_epochs: float | None = None
    stage1_learning_rate: float | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    teacher_epochs: float = 3
    teacher_learning_rate: float | None = None
    precision: str = "auto"
    limit: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.preset is None):
            raise PlanError("compress: expected factor= or preset=, one of them. Try --factor 8.")
        if self.factor is not None:
            check_factor(self.factor, "compress")
        if self.text_columns is not None:
            object.__setattr__(self, "text_columns", tuple(self.text_columns))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompressSettings:
        known = tuple(field.name for field in fields(cls))
        for key in data:
            if key not in known:
                raise PlanError(f"compress settings: unknown key {key!r}. {near(key, known)}")
        return cls(**data)


class Job:
    """The output folder: settings, finished steps and their results, in ``state.json``."""

    def __init__(self, settings: CompressSettings, say: Say = print) -> None:
        self.settings, self.say = settings, say
        self.folder = Path(settings.output)
        self._prepare()
        self.state_file = self.folder / "state.json"
        asked = json.loads(json.dumps(asdict(settings)))
        self.state: dict[str, Any] = {"settings": asked, "steps": {}}
        if self.state_file.is_file():
            before = json.loads(self.state_file.read_text())
            changed = sorted(k for k in asked if before["settings"].get(k) != asked[k])
            changed = [key for key in changed if key != "output"]
            if changed:
                raise CheckpointError(
                    f"{self.folder}: holds a run with other settings ({', '.join(changed)}). Use "
                    "the same settings to resume it, or another output folder."
                )
            self.state = before

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".probe"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot be written ({error.strerror}). Choose another --output."
            ) from error

    def need_space(self, size: int) -> None:
        """Raise `CheckpointError` unless ``size`` bytes are free where the output goes."""
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise CheckpointError(
                f"{self.folder}: {free / 2**30:.1f} GiB free, about {size / 2**30:.1f} GiB needed "
                "for checkpoints. Free some space or choose another --output."
            )

    def step(self, name: str, what: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step: run now, or kept from before the interruption."""
        if name in self.state["steps"]:
            self.say(f"{what}: done before")
        else:
            self.say(what)
            start = time.monotonic()
            result = run()
            result["seconds"] = round(time.monotonic() - start, 1)
            self.state["steps"][name] = result
            scratch = self.state_file.with_suffix(".part")
            scratch.write_text(json.dumps(self.state, indent=1))
            os.replace(scratch, self.state_file)
        found: dict[str, Any] = self.state["steps"][name]
        return found

    def save_model(self, model: Any, tokenizer: Any, name: str) -> None:
        """``folder/name`` as a whole or not at all."""
        scratch, final = self.folder / f".{name}.part", self.folder / name
        shutil.rmtree(scratch, ignore_errors=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(scratch, final)


def compress(settings: CompressSettings, say: Say = print, data: Any = None) -> dict[str, Any]:
    """Run the job (or what is left of it) and return the content of report.json.

    data: a `kronbert.distill.data.TaskData` to use instead of settings.task. Raises a
    `KronbertError` before anything is trained when the parts do not go together."""
    from transformers import AutoTokenizer

    from .conversion import convert, plan
    from .distill.data import load_folder, load_task, tokenize
    from .distill.finetune import evaluate, labels_only, run_stage
    from .distill.recipes.kroneckerbert import kroneckerbert
    from .distill.stages import Stage
    from .distill.text import load_text, pack_text
    from .job_report import write_report

    job = Job(settings, say)
    if data is None:
        if settings.text_columns or settings.label_column:
            data = load_folder(
                settings.task,
                text=settings.text_columns,
                label=settings.label_column,
                limit=settings.limit,
                seed=settings.seed,
            )
        else:
            data = load_task(
                settings.task,
                data_dir=settings.data_dir,
                limit=settings.limit,
                seed=settings.seed,
            )
    task = data.task
    tokenizer = _open(AutoTokenizer, settings.model)
    recipe = kroneckerbert(settings.preset or settings.factor or 0.0, task=task.name, mlm=False)
    on_task = _changed(
        recipe.stage("task"),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        max_length=settings.max_length or task.max_length,
        seed=settings.seed,
    )
    rows = tokenize(data, tokenizer, on_task.max_length)
    wanted = {"factor": settings.factor, "preset": settings.preset}

    def model_of(name: str) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(job.folder / name)

    def fine_tune() -> dict[str, Any]:
        teacher, tuned = open_teacher(settings.model, task)
        plan(teacher, **wanted, errors=False)  # an unreachable factor is found before training
        job.need_space(10 * 4 * sum(p.numel() for p in teacher.parameters()))
        history: list[dict[str, Any]] = []
        if not tuned:
            rate = 1e-4 if teacher.config.hidden_size < 512 else 3e-5
            stage = Stage(
                name="teacher",
                objective=labels_only(),
                learning_rate=settings.teacher_learning_rate or rate,
                epochs=settings.teacher_epochs,
                batch_size=on_task.batch_size,
                seed=settings.seed,
            )
            history = run_stage(
                teacher,
                None,
                stage,
                rows,
                job.folder / "teacher-run",
                tokenizer=tokenizer,
                precision=settings.precision,
            )
        job.save_model(teacher, tokenizer, "teacher")
        scores = evaluate(teacher, rows, tokenizer)
        return {"scores": scores, "fine_tuned_here": not tuned, "history": history}

    job.step("teacher", f"1/4 teacher: {settings.model} on {task.name} ({data.source})", fine_tune)

    def general() -> dict[str, Any]:
        teacher = model_of("teacher")
        student = convert(teacher, **wanted)
        stage = _changed(
            recipe.stage("general"),
            epochs=settings.stage1_epochs,
            learning_rate=settings.stage1_learning_rate,
            batch_size=settings.batch_size,
            max_length=on_task.max_length,
            seed=settings.seed,
        )
        text = load_text(settings.stage1_text or "", limit_tokens=settings.stage1_words)
        blocks = pack_text(text, tokenizer, stage.max_length)
        history = run_stage(
            student,
            teacher,
            stage,
            blocks,
            job.folder / "stage1-run",
            tokenizer=tokenizer,
            precision=settings.precision,
        )
        job.save_model(student, tokenizer, "stage1")
        return {"history": history, "blocks": len(blocks), "stage": stage.to_dict()}

    if settings.stage1_text:
        job.step("stage1", f"2/4 stage 1: general text {settings.stage1_text}", general)

    def distil() -> dict[str, Any]:
        teacher = model_of("teacher")
        student = model_of("stage1") if settings.stage1_text else convert(teacher, **wanted)
        before = evaluate(student, rows, tokenizer)
        history = run_stage(
            student,
            teacher,
            on_task,
            rows,
            job.folder / "task-run",
            tokenizer=tokenizer,
            precision=settings.precision,
        )
        job.save_model(student, tokenizer, "student")
        after = evaluate(student, rows, tokenizer)
        return {
            "scores": after,
            "scores_before": before,
            "history": history,
            "stage": on_task.to_dict(),
        }

    job.step("task", f"3/4 stage 2: distilling on {task.name}", distil)
    say("4/4 report")
    teacher, student = model_of("teacher"), model_of("student")
    return write_report(job.folder, job.state, task, data.source, student, teacher)


def open_teacher(name: str, task: Any) -> tuple[Any, bool]:
    """(model with a head for ``task``, whether it is fine-tuned already).

    A checkpoint saved as ``...ForSequenceClassification`` is a fine-tuned teacher; its head must
    have the task's classes."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = _open(AutoConfig, name)
    saved_as = (config.architectures or [""])[0]
    tuned = saved_as.endswith("ForSequenceClassification")
    if tuned and config.num_labels != task.num_labels:
        raise DistillError(
            f"{name}: its head has {config.num_labels} classes, task {task.name!r} has "
            f"{task.num_labels}. Give a teacher fine-tuned for the task, or its base model."
        )
    head: dict[str, Any] = {"num_labels": task.num_labels}
    if task.labels is None:
        head["problem_type"] = "regression"
    else:
        head["id2label"] = dict(enumerate(task.labels))
        head["label2id"] = {label: i for i, label in enumerate(task.labels)}
    if tuned:
        _check_labels(name, config, task)
        return _open(AutoModelForSequenceClassification, name), True
    return _open(AutoModelForSequenceClassification, name, **head), False


def _check_labels(name: str, config: Any, task: Any) -> None:
    """A fine-tuned head with the task's label names in another order would score nonsense."""
    own = [str(config.id2label[i]).lower() for i in range(config.num_labels)]
    if task.labels is None or all(label.startswith("label_") for label in own):
        return
    asked = [label.lower() for label in task.labels]
    if own != asked and sorted(own) == sorted(asked):
        raise DistillError(
            f"{name}: its classes are {own}, task {task.name!r} has them as {asked}. Change the "
            "data's label order, or fine-tune the base model here."
        )


def _open(auto: Any, name: str, **kwargs: Any) -> Any:
    try:
        return auto.from_pretrained(name, **kwargs)
    except KronbertError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"model {name!r} cannot be loaded: {str(error).splitlines()[0]} Give a folder that "
            "save_pretrained wrote (model and tokenizer), or a hub name while online."
        ) from error


def _changed(stage: Any, **values: Any) -> Any:
    return replace(stage, **{key: value for key, value in values.items() if value is not None})
