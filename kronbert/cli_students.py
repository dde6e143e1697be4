"""Commands about students that were distilled on general text, for any task."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .cli_options import Factor, Layers, Preset, Rules, parse_rules

out = Console(markup=False, highlight=False)


def say(text: str) -> None:
    """A line as it is: in files and pipes rich would break paths at column 80."""
    out.print(text, soft_wrap=True)


class Init(str, Enum):
    """Where a first student's numbers come from, see `kronbert.convert`."""

    data = "data"
    weights = "weights"


class Optimizer(str, Enum):
    """Of the matrices of Kronecker layers, see `kronbert.distill.muon`."""

    muon = "muon"
    adamw = "adamw"


def pretrain_student(
    model: Annotated[str, typer.Option(help="encoder that teaches: hub name or folder")],
    text: Annotated[str, typer.Option(help="a file (.txt, .jsonl, .parquet), or a hub data set")],
    output: Annotated[str, typer.Option(help="folder for student, report and held-out curve")],
    factor: Factor = None,
    preset: Preset = None,
    rule: Rules = None,
    layers: Layers = None,
    student: Annotated[
        str | None, typer.Option(help="saved student of this model to go on from")
    ] = None,
    init: Annotated[
        Init, typer.Option(help="data: fitted to the text's inputs; weights: to weights alone")
    ] = Init.data,
    valid: Annotated[
        str | None, typer.Option(help="held-out text; its losses are logged and drawn")
    ] = None,
    valid_blocks: Annotated[
        int, typer.Option(min=1, help="blocks or sentences of it, evenly spaced")
    ] = 128,
    words: Annotated[int | None, typer.Option(help="stop reading text after so many")] = None,
    epochs: Annotated[float | None, typer.Option(help="default: 1")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="default: 3e-3; sentences: 1e-3")
    ] = None,
    optimizer: Annotated[
        Optimizer, typer.Option(help="of the layers' matrices; adamw for all else")
    ] = Optimizer.muon,
    batch_size: Annotated[
        int | None, typer.Option(help="blocks per step; default: 32; sentences: 128")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="tokens per block, or of a sentence at most; default: 128, or what the model takes"
        ),
    ] = None,
    mlm: Annotated[
        bool | None,
        typer.Option("--mlm/--no-mlm", help="train the masked-LM head; default: if there is one"),
    ] = None,
    sentences: Annotated[
        bool,
        typer.Option(
            "--sentences",
            help="learn the embeddings of the text's sentences, as a sentence encoder gives them; "
            "best with --student, after a run without",
        ),
    ] = False,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32")] = "auto",
    half: Annotated[
        bool, typer.Option("--half", help="save float16 weights, loaded as float32")
    ] = False,
    teacher_name: Annotated[
        str | None, typer.Option(help="what the report calls the model, for instance its hub name")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="of the student, for its model card")] = None,
    seed: int = 42,
) -> None:
    """Distil a student on general text, for any task. Run again to resume."""
    from .pretrain import PretrainSettings
    from .pretrain import pretrain_student as run

    settings = PretrainSettings(
        model=model,
        text=text,
        output=output,
        factor=factor,
        preset=preset,
        rules=parse_rules(rule),
        layers=layers,
        student=student,
        init=init.value,
        valid=valid,
        valid_blocks=valid_blocks,
        words=words,
        epochs=epochs,
        learning_rate=learning_rate,
        optimizer=optimizer.value,
        batch_size=batch_size,
        max_length=max_length,
        mlm=mlm,
        sentences=sentences,
        precision=precision,
        half=half,
        teacher_name=teacher_name,
        licence=licence,
        seed=seed,
    )
    content = run(settings, say)
    speed = content["tokens_per_second"]
    say(
        f"{content['student']['factor']:.2f} times smaller, {content['tokens']:,} tokens"
        + (f" at {speed:,.0f} a second" if speed else "")
        + f"; student in {Path(output) / 'student'}"
    )


def students() -> None:
    """List the students that come with kronbert, or lie in the folder KRONBERT_STUDENTS names."""
    from .shipped import known_students, list_students

    found = list_students()
    if not found:
        out.print(known_students(""))
        return
    table = Table()
    for column in ("name", "teacher", "times smaller", "parameters", "MB"):
        left = column in ("name", "teacher")
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "name")
    for student in found:
        factor, parameters = student["factor"], student["parameters"]
        table.add_row(
            student["name"],
            student["teacher"] or "unknown",
            "unknown" if factor is None else f"{factor:.1f}",
            "unknown" if parameters is None else f"{parameters:,}",
            f"{student['bytes'] / 1e6:.1f}",
        )
    out.print(table)
