"""The command line: plan, convert, compress, evaluate, report, bench, calibrate, demo; students."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_calibrate import calibrate
from .cli_options import (
    DataDir,
    Factor,
    Keep,
    LabelColumn,
    Layers,
    Model,
    Preset,
    Regression,
    Rules,
    TextColumn,
    Version,
    parse_rules,
)
from .cli_students import pretrain_student, say, students
from .errors import DataError, KronbertError, PlanError
from .job_folder import writable

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Transformer encoders 8 to 20 times smaller, as sums of Kronecker products.",
)
out = Console(markup=False, highlight=False)


@app.callback()
def _options(version: Version = False) -> None:
    pass


@app.command()
def plan(
    model: Model,
    factor: Factor = None,
    preset: Preset = None,
    rule: Rules = None,
    keep: Keep = None,
    layers: Layers = None,
    weights: Annotated[
        bool, typer.Option(help="load the weights too, and print the error of every fit")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="write the plan as JSON")] = None,
) -> None:
    """Print what becomes of every layer; no weights are needed."""
    from transformers import AutoConfig

    import kronbert

    from .inventory import skeleton
    from .job_depth import base_of
    from .job_models import open_model, open_pretrained

    if save is not None:
        if save.is_dir():
            raise PlanError(f"--save {save}: is a folder. Name a file in it.")
        writable(save.parent)
    source = open_model(model) if weights else open_pretrained(AutoConfig, model)
    if layers is not None and not weights:
        source = skeleton(source)
    base, wanted = base_of(source, layers, {"factor": factor, "preset": preset})
    made = kronbert.plan(base, **wanted, rules=parse_rules(rule), keep=keep)
    show_plan(made, source)
    if save is not None:
        save.write_text(json.dumps(made.to_json(), indent=1) + "\n")


@app.command()
def convert(
    model: Model,
    output: Annotated[Path, typer.Option(help="folder for the student")],
    factor: Factor = None,
    preset: Preset = None,
    rule: Rules = None,
    keep: Keep = None,
    layers: Layers = None,
    from_plan: Annotated[
        Path | None, typer.Option("--plan", help="JSON that `kronbert plan --save` wrote")
    ] = None,
) -> None:
    """Write an initialised student: the nearest sums of Kronecker products, not yet distilled."""
    import kronbert

    from .job_depth import base_of
    from .job_models import open_model
    from .sentence_files import copy_pooling

    made = read_plan(from_plan) if from_plan is not None else None
    if output.is_dir() and Path(model).is_dir() and output.samefile(model):
        raise PlanError(f"--output {output}: is the model itself. Choose another folder.")
    writable(output)
    dense = open_model(model)
    base, wanted = base_of(dense, layers, {"factor": factor, "preset": preset})
    student: Any
    student = kronbert.convert(base, **wanted, rules=parse_rules(rule), keep=keep, plan=made)
    show_plan(student.kronecker_plan, dense)
    student.save_pretrained(output)
    copy_preparation(model, output)
    copy_pooling(model, output)
    out.print(f"wrote {output}", soft_wrap=True)


@app.command()
def compress(
    model: Annotated[
        str, typer.Option(help="teacher: hub name or folder, with a task head or not")
    ],
    task: Annotated[str, typer.Option(help="a GLUE name, or a folder of tables")],
    output: Annotated[str, typer.Option(help="folder for student, report and pictures")],
    factor: Factor = None,
    preset: Preset = None,
    layers: Layers = None,
    data_dir: DataDir = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    regression: Regression = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="start from this pretrain-student's folder or name; default: one of `kronbert "
            "students` that suits; 'none': start from the teacher's weights"
        ),
    ] = None,
    stage1_text: Annotated[
        str | None, typer.Option(help="general text for stage 1: a file, or a hub data set")
    ] = None,
    stage1_words: Annotated[int | None, typer.Option(help="stop reading it after so many")] = None,
    stage1_epochs: Annotated[float | None, typer.Option()] = None,
    stage1_learning_rate: Annotated[float | None, typer.Option()] = None,
    splice: Annotated[
        int | None, typer.Option(help="rows made of two training rows; default: the recipe's")
    ] = None,
    reword: Annotated[
        float | None,
        typer.Option(help="share of their words that become others: 0.15 helps pairs at 19"),
    ] = None,
    augment: Annotated[int, typer.Option(help="copies of every row with words replaced")] = 0,
    unlabelled: Annotated[
        str | None, typer.Option(help="more text of the task's kind, without labels")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="of stage 2; default: the recipe's")] = None,
    cache_teacher: Annotated[
        bool, typer.Option(help="read rows with the teacher once for all passes; gigabytes of disk")
    ] = False,
    learning_rate: Annotated[float | None, typer.Option(help="of stage 2")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens per row")] = None,
    teacher_epochs: Annotated[float, typer.Option(help="if the teacher must be fine-tuned")] = 3,
    teacher_learning_rate: Annotated[float | None, typer.Option()] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32")] = "auto",
    limit: Annotated[int | None, typer.Option(help="training rows, for a trial")] = None,
    seed: int = 42,
) -> None:
    """Fine-tune (if need be), convert, distil, evaluate and report. Run again to resume."""
    from .job import CompressSettings
    from .job import compress as run

    settings = CompressSettings(
        model=model,
        task=task,
        output=output,
        factor=factor,
        preset=preset,
        layers=layers,
        data_dir=data_dir,
        text_columns=tuple(text_column) if text_column else None,
        label_column=label_column,
        regression=regression,
        student=student,
        stage1_text=stage1_text,
        stage1_words=stage1_words,
        stage1_epochs=stage1_epochs,
        stage1_learning_rate=stage1_learning_rate,
        splice=splice,
        reword=reword,
        augment=augment,
        unlabelled=unlabelled,
        epochs=epochs,
        cache_teacher=cache_teacher,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        teacher_epochs=teacher_epochs,
        teacher_learning_rate=teacher_learning_rate,
        precision=precision,
        limit=limit,
        seed=seed,
    )
    finish(run(settings, say), output)


@app.command()
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="a GLUE name, or a folder of tables")],
    data_dir: DataDir = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    regression: Regression = None,
    max_length: Annotated[
        int | None, typer.Option(help="tokens per row; default: what compress saved, else 128")
    ] = None,
) -> None:
    """Score a model (dense or converted) on a task's dev set with the task's own metrics."""
    from .job_scores import scores_of

    found = scores_of(
        model,
        task,
        max_length=max_length,
        data_dir=data_dir,
        text_columns=tuple(text_column) if text_column else None,
        label_column=label_column,
        regression=regression,
    )
    out.print(f"{model} on {found.what}, up to {found.max_length} tokens a row")
    for name, values in found.scores.items():
        out.print(f"{name}: " + ", ".join(f"{k} {100 * v:.2f}" for k, v in values.items()))


@app.command()
def report(
    student: Model,
    teacher: Annotated[str | None, typer.Option(help="the dense model, to compare with")] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for report.md, .json, picture")
    ] = None,
    latency: Annotated[bool, typer.Option(help="time both models")] = True,
    sequence_length: Annotated[int, typer.Option(min=1, help="tokens of a timed row")] = 128,
) -> None:
    """Parameters, bytes, FLOPs, latency and error per layer of a saved student."""
    import kronbert

    from .job_models import open_model

    if output is not None:
        writable(output)
        kronbert.Report.check_folder(output)

    made = kronbert.report(
        open_model(student),
        open_model(teacher) if teacher else None,
        latency=latency,
        sequence_length=sequence_length,
    )
    out.print(made)
    if output is not None:
        made.save(output)
        out.print(f"wrote {output}", soft_wrap=True)


@app.command()
def bench(
    model: Model,
    factor: Factor = None,
    preset: Preset = None,
    layers: Layers = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1)] = None,
    sequence_length: Annotated[int, typer.Option(min=1)] = 128,
) -> None:
    """Latency of a model beside its converted twin, alternating in one process."""
    import kronbert

    from .job_depth import base_of
    from .job_models import open_model

    dense = open_model(model).eval()
    base, wanted = base_of(dense, layers, {"factor": factor, "preset": preset})
    student = kronbert.convert(base, **wanted)
    out.print(
        kronbert.report(
            student, dense, batch_sizes=tuple(batch_size or (1, 8)), sequence_length=sequence_length
        )
    )


@app.command()
def demo(
    output: str = "kronbert-demo",
    data_dir: Annotated[str | None, typer.Option(help="folder with sst2/train.tsv")] = None,
    factor: float = 8.0,
    seed: int = 42,
) -> None:
    """Compress MiniLM for sentiment, end to end: on SST-2, from --data-dir or the hub, else, where
    no hub answers, on made-up sentences."""
    from .demo import run_demo

    finish(run_demo(output, data_dir, factor, seed, say), output)


app.command("calibrate")(calibrate)
app.command("pretrain-student")(pretrain_student)
app.command("students")(students)


def finish(content: dict[str, Any], output: str) -> None:
    scores, metric = content["scores"], content["task"]["primary"]
    first = next(iter(scores["student"]))
    teacher, student = scores["teacher"][first][metric], scores["student"][first][metric]
    out.print(
        f"{metric}: teacher {100 * teacher:.1f}, student {100 * student:.1f}; "
        f"read {Path(output) / 'report.md'}"
    )


def show_plan(made: Any, source: Any) -> None:
    """The plan; of fewer layers than ``source`` has, how much smaller than that model it is."""
    out.print(made)
    whole = getattr(source, "num_parameters", lambda: made.dense_parameters)()
    if whole != made.dense_parameters:
        out.print(
            f"{whole / made.parameters:.2f} times smaller than the model of all layers, which has "
            f"{whole:,} parameters"
        )


def read_plan(file: Path) -> Any:
    import kronbert

    try:
        return kronbert.Plan.from_json(json.loads(file.read_text()))
    except KronbertError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"--plan {file}: cannot be read ({error}). Expected what `kronbert plan --save` wrote."
        ) from error


def copy_preparation(model: str, output: Path) -> None:
    """What makes a model's inputs travels with the student: tokenizer, or settings for images."""
    from transformers.utils import cached_file

    from .job_models import open_tokenizer

    try:
        settings = cached_file(model, "preprocessor_config.json")
    except OSError:
        settings = None
    if settings is not None:
        shutil.copy(settings, output)
    try:
        open_tokenizer(model).save_pretrained(output)
    except DataError:
        if settings is None:
            out.print(f"{model} has no tokenizer: none is copied.")


def main() -> None:
    """Entry point of the ``kronbert`` command: errors of ours are one message, not a traceback."""
    if len(sys.argv) > 1 and sys.argv[1] in ("compress", "demo", "pretrain-student"):
        # Read when torch is loaded. GNU OpenMP's threads spin while they wait; beside other work on
        # the same cores (2 of an AVX512 server, load 4) a step of MiniLM, 32 x 16 tokens, took
        # 1.7 to 9 s so, and 0.46 s with this.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # no "⊗" in a pipe's code page
    try:
        app()
    except KronbertError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"{type(error).__name__}: {error}", markup=False, highlight=False
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
