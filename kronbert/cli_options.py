"""Options that several commands share, and how their text is read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .errors import PlanError

Model = Annotated[str, typer.Argument(help="hub name, or a folder with config.json")]
Factor = Annotated[
    float | None, typer.Option(help="parameters before / after, whole model; 19 = 19 times smaller")
]
Preset = Annotated[str | None, typer.Option(help="the paper's shapes: k5, k8, k19 or k21")]
Layers = Annotated[
    int | None,
    typer.Option(help="of the student, evenly spaced of the model's; default: all", min=1),
]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", help="NAME=VALUE, VALUE: dense, 384x48*2x16, rank:4 or factor:8"),
]
Keep = Annotated[list[str] | None, typer.Option(help="pattern of names that stay dense")]
DataDir = Annotated[
    str | None, typer.Option(help="folder with GLUE's TSV files, TASK/train.tsv; else the hub")
]
TextColumn = Annotated[
    list[str] | None, typer.Option(help="of a folder of tables; twice for pairs")
]
LabelColumn = Annotated[str | None, typer.Option(help="of a folder of tables")]


def _version(asked: bool) -> None:
    if asked:
        import kronbert

        typer.echo(f"kronbert {kronbert.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and end")
]
Regression = Annotated[
    bool | None,
    typer.Option(
        "--regression/--classes",
        help="whether a folder's labels are scores; default: as a fine-tuned model's head says, "
        "else if they have a point",
    ),
]


def parse_rules(rules: list[str] | None) -> dict[str, Any] | None:
    """NAME=VALUE pairs as `KroneckerConfig` takes them."""
    if not rules:
        return None
    parsed: dict[str, Any] = {}
    for text in rules:
        name, equals, value = text.rpartition("=")
        if not equals:
            raise PlanError(
                f"--rule {text!r}: expected NAME=VALUE, for example 're:.*query=dense'."
            )
        if name in parsed:
            raise PlanError(f"--rule {text!r}: a second one for {name!r}. Give one.")
        key, colon, number = value.partition(":")
        if colon and key in ("rank", "factor"):
            try:
                parsed[name] = {key: int(number) if key == "rank" else float(number)}
            except ValueError as error:
                raise PlanError(f"--rule {text!r}: {number!r} is no number.") from error
        else:
            parsed[name] = value
    return parsed
