"""`report`: what a student costs beside its teacher, and how far its weights are from them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .config import check_schema
from .errors import ReportError
from .inventory import group_within, inventory, roots_of
from .latency import (
    Timing,
    compare_models,
    environment,
    paired_ratio,
    random_inputs,
)
from .linear import KroneckerLinear
from .planning import LayerSize, PlannedLayer
from .weight_errors import weight_errors

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """What one model costs.

    bytes_by_dtype: dtype -> bytes of the tensors that `save_pretrained` stores, tied ones once.
    linear_flops: per sequence, of the attention and feed-forward matrices, as `Plan.linear_flops`
    counts. latency: batch size -> time per batch; empty when it was not measured."""

    name: str
    parameters: int
    bytes_by_dtype: Mapping[str, int]
    linear_flops: int
    latency: Mapping[int, Timing] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_dtype.values())

    @property
    def dtype(self) -> str:
        return ", ".join(self.bytes_by_dtype)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a student costs beside its teacher: text, rich, markdown, JSON; `save` writes a folder.

    sequence_length: of the FLOPs. inputs: what the models were run on ("" without latency).
    latency_ratio: batch size -> median of teacher / student over paired rounds; > 1 is faster.
    errors: Kronecker layer -> relative Frobenius error of its current weight against the teacher's.
    unmatched: Kronecker layers for which the teacher has no weight of the same name and size, or,
    of another depth, none that is known to be its own."""

    student: ModelFigures
    teacher: ModelFigures | None = None
    sequence_length: int
    seed: int
    inputs: str = ""
    latency_ratio: Mapping[int, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    environment: Mapping[str, str | int]

    @property
    def factor(self) -> float | None:
        """Compression ratio, parameters of the teacher / student; None without a teacher."""
        return self.teacher.parameters / self.student.parameters if self.teacher else None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "factor": self.factor,
            "student": _figures_to_json(self.student),
            "teacher": _figures_to_json(self.teacher) if self.teacher else None,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "inputs": self.inputs,
            "latency": [
                {
                    "batch_size": batch,
                    "student": timing.to_json(),
                    "teacher": self.teacher.latency[batch].to_json() if self.teacher else None,
                    "ratio": self.latency_ratio.get(batch),
                }
                for batch, timing in self.student.latency.items()
            ],
            "errors": dict(self.errors),
            "unmatched": list(self.unmatched),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """From `to_json`; `KronbertError` for missing or unknown keys or a newer schema."""
        known = ("factor", "student", "teacher", "sequence_length", "seed", "inputs", "latency",
                 "errors", "unmatched", "environment")  # fmt: skip
        data = check_schema(data, known, "Report")
        missing = [key for key in known if key not in data]
        if missing:
            raise ReportError(f"Report: key {missing[0]!r} is missing. Write it with to_json.")
        rows, dense = data["latency"], data["teacher"]
        return cls(
            student=_figures_from_json(data["student"], "student", rows),
            teacher=_figures_from_json(dense, "teacher", rows) if dense else None,
            latency_ratio={row["batch_size"]: row["ratio"] for row in rows if row["ratio"]},
            unmatched=tuple(data["unmatched"]),
            sequence_length=data["sequence_length"],
            seed=data["seed"],
            inputs=data["inputs"],
            errors=data["errors"],
            environment=data["environment"],
        )

    def to_markdown(self) -> str:
        """Sections of second level: size and speed, error per layer, how it was measured."""
        lines = []
        for title, header, rows in _tables(self):
            lines += [f"## {title}", "", _row(header), "|---|" + "---:|" * (len(header) - 1)]
            lines += [*map(_row, rows), ""]
        return "\n".join([*lines, *_notes(self)])

    @staticmethod
    def check_folder(folder: Path) -> None:
        """Raise `ReportError` where report.json is none of `save`'s: a job's, or a student's."""
        file = folder / "report.json"
        try:
            own = not file.exists() or "environment" in json.loads(file.read_text())
        except (OSError, ValueError, TypeError):
            own = False
        if not own:
            raise ReportError(
                f"{file}: of another command, which reads it again. Choose another folder."
            )

    def save(self, folder: str | Path) -> None:
        """Write report.json, report.md and, where there are errors, error_per_layer.png.

        Replaces a report of before; `ReportError` where another command's would be."""
        target = Path(folder)
        self.check_folder(target)
        text = f"# kronbert report: {self.student.name}\n\n{self.to_markdown()}\n"
        try:
            target.mkdir(parents=True, exist_ok=True)
            if self.errors:
                from .pictures import error_per_layer

                error_per_layer(self.errors, target / "error_per_layer.png")
                text += "\n![Error per layer](error_per_layer.png)\n"
            (target / "report.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
            (target / "report.md").write_text(text, encoding="utf-8")
        except OSError as error:
            raise ReportError(
                f"Report.save({str(folder)!r}): cannot write there ({error.strerror}). Give a "
                "folder that can be written, on a disk with room."
            ) from error

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100, color_system=None, force_jupyter=False, markup=False).print(
            self.__rich__()
        )
        return text.getvalue().rstrip()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        parts: list[Any] = []
        for title, header, rows in _tables(self):
            table = Table(title=title)
            for i, column in enumerate(header):
                table.add_column(column, justify="right" if i else "left", overflow="fold")
            for row in rows:
                table.add_row(*row)
            parts.append(table)
        return Group(*parts, *_notes(self))


def report(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    latency: bool = True,
    batch_sizes: Sequence[int] = (1, 8),
    sequence_length: int = 128,
    inputs: Mapping[str, Tensor] | None = None,
    seconds: float = 3.0,
    seed: int = 0,
) -> Report:
    """Parameters, bytes, FLOPs, latency, and the error of every Kronecker layer.

    A dense student is welcome (a baseline); its errors are empty. latency: run both models in turn,
    in eval and inference mode, about ``seconds`` per batch size, on random ids (or pixels) drawn
    from ``seed`` with a full attention mask. inputs: for models that take anything else, one
    example, name -> tensor (1, ...), repeated to each batch size. Nothing is changed in either."""
    if sequence_length < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ReportError(
            f"report(batch_sizes={batch_sizes!r}, sequence_length={sequence_length!r}): expected "
            "whole numbers >= 1. To time nothing: latency=False."
        )
    models = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    example = dict(inputs or {})
    timings: dict[int, dict[str, Timing]] = {}
    if latency:
        for name, value in example.items():
            if value.dim() == 0 or value.shape[0] != 1:
                raise ReportError(
                    f"report(inputs=): {name!r} has shape {tuple(value.shape)}, expected one "
                    "example (1, ...). It is repeated to each of batch_sizes."
                )
        for batch in batch_sizes:
            if not inputs:
                example = random_inputs(models, sequence_length, batch, seed)
            timings[batch] = compare_models(models, example, batch, seconds=seconds)
    figures = {
        who: ModelFigures(
            name=type(model).__name__,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            bytes_by_dtype=_bytes_by_dtype(model),
            linear_flops=linear_flops(model, sequence_length),
            latency={batch: timing[who] for batch, timing in timings.items()},
        )
        for who, model in models.items()
    }
    ratio: dict[int, float] = {}
    errors: dict[str, float] = {}
    unmatched: tuple[str, ...] = ()
    if teacher is not None:
        ratio = {b: paired_ratio(t["teacher"], t["student"]) for b, t in timings.items()}
        errors, unmatched = weight_errors(student, teacher)
    sizes = (", ".join(map(str, ("batch", *value.shape[1:]))) for value in example.values())
    return Report(
        student=figures["student"],
        teacher=figures.get("teacher"),
        sequence_length=sequence_length,
        seed=seed,
        inputs=", ".join(f"{k} ({size})" for k, size in zip(example, sizes, strict=True)),
        latency_ratio=ratio,
        errors=errors,
        unmatched=unmatched,
        environment=environment(student),
    )


def linear_flops(model: nn.Module, sequence_length: int = 128) -> int:
    """FLOPs of the attention and feed-forward matrices per sequence, read from the modules.

    Counts as `Plan.linear_flops` does, of the plan that made ``model``, dense or converted."""
    layers = [PlannedLayer(size=size) for size in inventory(model).layers]
    roots = roots_of(model)
    for name, module in model.named_modules():
        if isinstance(module, KroneckerLinear):
            size = LayerSize(
                name=name,
                kind="linear",
                group=group_within(name, "linear", roots),
                out=module.out_features,
                inner=module.in_features,
            )
            layers.append(PlannedLayer(size=size, groups=module.groups))
    counted = (layer for layer in layers if layer.size.group in ("attention", "feed-forward"))
    return sequence_length * sum(layer.flops for layer in counted)


def _bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    tensors = {id(value): value for value in model.state_dict(keep_vars=True).values()}
    found: dict[str, int] = {}
    for value in tensors.values():
        dtype = str(value.dtype).removeprefix("torch.")
        found[dtype] = found.get(dtype, 0) + value.numel() * value.element_size()
    return found


def _figures_to_json(figures: ModelFigures) -> dict[str, Any]:
    names = ("name", "parameters", "bytes", "linear_flops")
    told = {name: getattr(figures, name) for name in names}
    return {**told, "bytes_by_dtype": dict(figures.bytes_by_dtype)}


def _figures_from_json(
    data: Mapping[str, Any], who: str, rows: Sequence[Mapping[str, Any]]
) -> ModelFigures:
    timings = {row["batch_size"]: Timing(**row[who]) for row in rows}
    return ModelFigures(**{k: v for k, v in data.items() if k != "bytes"}, latency=timings)


def _tables(made: Report) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows): what every form of the report shows."""
    sides = [side for side in (made.teacher, made.student) if side is not None]
    header = ["", *(["teacher", "student", "teacher / student"] if made.teacher else ["student"])]

    def row(label: str, cells: list[str], ratio: float | None) -> list[str]:
        return [label, *cells, *([f"{ratio:.2f}" if ratio else ""] if made.teacher else [])]

    def over(name: str) -> float | None:
        if made.teacher is None or not getattr(made.student, name):
            return None
        return getattr(made.teacher, name) / getattr(made.student, name)

    stored = [f"{side.bytes / 2**20:.2f} ({side.dtype})" for side in sides]
    rows = [
        row("parameters", [f"{side.parameters:,}" for side in sides], made.factor),
        row("stored weights, MiB", stored, over("bytes")),
        row(
            f"linear layers, MFLOP per {made.sequence_length} tokens",
            [f"{side.linear_flops / 1e6:,.1f}" for side in sides],
            over("linear_flops"),
        ),
    ]
    for batch in made.student.latency:
        label = f"latency at batch {batch}, ms (p20-p80)"
        times = [_ms(side.latency[batch]) for side in sides]
        rows.append(row(label, times, made.latency_ratio.get(batch)))
    yield "Size and speed", header, rows
    if made.errors:
        layers: dict[str, list[float]] = {}
        for name, error in made.errors.items():
            layers.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(error)
        yield (
            "Relative error of the weights",
            ["layer", "n", "mean", "largest"],
            [
                [name, str(len(x)), f"{sum(x) / len(x):.3f}", f"{max(x):.3f}"]
                for name, x in layers.items()
            ],
        )


def _notes(made: Report) -> list[str]:
    lines = []
    if made.unmatched:
        lines.append(
            f"Not compared, as the teacher has no such layer or another depth: "
            f"{', '.join(made.unmatched)}."
        )
    if made.student.latency:
        turns = "alternating in one process; ratio: median of the pairs" if made.teacher else ""
        lines.append(f"Latency: {made.inputs}; inference mode" + (f", {turns}." if turns else "."))
    at = made.environment
    threads = f"{at['cores']} cores, {at['threads']} threads"
    versions = ", ".join(f"{k} {at[k]}" for k in ("python", "torch", "transformers", "kronbert"))
    lines.append(f"{at.get('gpu', at['cpu'])}, {threads}; {versions}; {at['date']}.")
    return lines


def _ms(timing: Timing) -> str:
    return f"{timing.median_ms:.2f} ({timing.p20_ms:.2f}-{timing.p80_ms:.2f})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
