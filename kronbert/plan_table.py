"""A `Plan` as a rich table: one row for layers that share a name pattern and shapes."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from .shapes import dense_flops

if TYPE_CHECKING:
    from .planning import Plan, PlannedLayer


def rows(plan: Plan) -> list[tuple[str, list[PlannedLayer]]]:
    """(pattern, layers): names that differ only in their numbers, with the same shapes."""
    found: dict[tuple[str, tuple], list[PlannedLayer]] = {}
    for layer in plan.layers:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.size.name)
        found.setdefault((pattern, layer.groups), []).append(layer)
    return [(pattern, layers) for (pattern, _), layers in found.items()]


def renderable(plan: Plan) -> Any:
    """The table, and under it the totals per group and of the model."""
    from rich.console import Group
    from rich.table import Table

    table = Table(title=f"{plan.model_type or 'model'}: {plan.factor:.2f} times smaller")
    for column, justify in (
        ("layer", "left"),
        ("n", "right"),
        ("weight", "right"),
        ("becomes", "left"),
        ("parameters", "right"),
        ("ratio", "right"),
        ("FLOPs b first", "right"),
        ("a first", "right"),
        ("error", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for pattern, layers in rows(plan):
        one = layers[0]
        size = one.size
        if size.tied_to:
            becomes = f"tied to {size.tied_to}"
        else:
            becomes = " + ".join(map(str, one.groups)) or "dense"
        errors = [layer.error for layer in layers if layer.error is not None]
        lookup = size.kind in ("embedding", "position")
        if lookup:
            flops = ("lookup", "")
        elif one.groups:
            flops = tuple(_short(sum(s.flops(o) for s in one.groups)) for o in ("b", "a"))
        else:
            flops = (_short(dense_flops(size.out, size.inner)), "")
        table.add_row(
            pattern,
            str(len(layers)),
            f"{size.out}x{size.inner}",
            becomes,
            f"{sum(layer.weights for layer in layers):,}",
            f"{size.weights / one.weights:.1f}" if one.weights else "",
            *flops,
            f"{sum(errors) / len(errors):.3f}" if errors else "",
        )
    groups = Table()
    for column in ("group", "layers", "weights before", "after", "ratio", "FLOPs / token"):
        groups.add_column(column, justify="left" if column == "group" else "right")
    for name, view in plan.by_group().items():
        groups.add_row(
            name,
            str(view["layers"]),
            f"{view['dense']:,}",
            f"{view['weights']:,}",
            f"{view['factor']:.1f}",
            _short(view["flops"]),
        )
    total = (
        f"{plan.dense_parameters:,} -> {plan.parameters:,} parameters; linear layers at sequence "
        f"128: {plan.linear_flops(dense=True) / 1e9:.2f} -> {plan.linear_flops() / 1e9:.2f} GFLOP"
    )
    return Group(table, groups, total)


def render(plan: Plan, width: int = 140) -> str:
    """The table as plain text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable(plan))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip()


def _short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"
