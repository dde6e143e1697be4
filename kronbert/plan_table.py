"""A `Plan` as a rich table: one row for layers that share a name pattern and shapes."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from itertools import compress, groupby
from typing import TYPE_CHECKING, Any

from .shapes import Groups, KroneckerShape, dense_flops, partial

if TYPE_CHECKING:
    from .planning import LayerSize, Plan, PlannedLayer

COLUMNS = ("layer", "n", "weight", "becomes", "parameters", "ratio", "b first", "a first", "error")
LEFT_OUT = ((), ("weight",), ("weight", "b first", "a first"))
"""What a console too narrow for all columns does without: the first of these that makes it fit."""


def rows(plan: Plan) -> list[tuple[str, list[PlannedLayer]]]:
    """(pattern, layers): names that differ only in their numbers, of one size, with the same
    shapes."""
    found: dict[tuple[str, Groups, LayerSize], list[PlannedLayer]] = {}
    for layer in plan.layers:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.size.name)
        alike = replace(layer.size, name="", dense_because=None)
        found.setdefault((pattern, layer.groups, alike), []).append(layer)
    return [(pattern, layers) for (pattern, _, _), layers in found.items()]


class Renderable:
    """A plan for rich: as many columns as the console has room for. At 80 a BERT's rows fit."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __rich_console__(self, console: Any, options: Any) -> Any:
        endless = options.update(width=1000)
        for left_out in LEFT_OUT:
            table = _layers(self.plan, left_out)
            if console.measure(table, options=endless).maximum <= options.max_width:
                break
        yield f"{self.plan.model_type or 'model'}: {self.plan.factor:.2f} times smaller"
        yield table
        yield _groups(self.plan)
        yield _totals(self.plan, left_out)


def _new_table() -> Any:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)


def _layers(plan: Plan, left_out: tuple[str, ...]) -> Any:
    table = _new_table()
    shown = [column not in left_out for column in COLUMNS]
    for column in compress(COLUMNS, shown):
        justify: Any = "left" if column in ("layer", "becomes") else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for head, members in groupby(rows(plan), key=lambda row: _split(row[0])[0]):
        # Rows stand under the part of their names that they share: it would not fit beside them.
        under = list(members)
        if len(under) == 1:
            table.add_row(*compress([under[0][0], *_cells(under[0][1])], shown))
            continue
        if head:
            table.add_row(head)
        for pattern, layers in under:
            name = "  " * bool(head) + _split(pattern)[1]
            table.add_row(*compress([name, *_cells(layers)], shown))
    return table


def _groups(plan: Plan) -> Any:
    groups = _new_table()
    for column in ("group", "layers", "weights", "after", "ratio", "FLOPs / token", "after"):
        justify = "left" if column == "group" else "right"
        groups.add_column(column, justify=justify)
    for name, view in plan.by_group().items():
        groups.add_row(
            name,
            str(view["layers"]),
            f"{view['dense']:,}",
            f"{view['weights']:,}",
            f"{view['factor']:.1f}",
            _short(view["dense_flops"]),
            _short(view["flops"]),
        )
    return groups


def _totals(plan: Plan, left_out: tuple[str, ...]) -> str:
    """The whole model's, and what the columns mean."""
    said = (
        f"{plan.dense_parameters:,} -> {plan.parameters:,} parameters.\n"
        f"FLOPs of the linear layers at sequence 128: {_short(plan.linear_flops(dense=True))} -> "
        f"{_short(plan.linear_flops())}."
    )
    if "a first" not in left_out:
        said += "\nColumns a first, b first: FLOPs per token of either order."
    if any(partial(shape, one.size.out) for one in plan.layers for shape in one.groups):
        said += "\nsvd(rank) first-last: a truncated SVD added to these rows only."
    return said


def render(plan: Plan, width: int = 100) -> str:
    """The table as plain text."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_jupyter=False, markup=False).print(
        Renderable(plan)
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip()


def _split(pattern: str) -> tuple[str, str]:
    """("encoder.layer.*", "output.dense"): up to the first number, else the parent."""
    head, star, leaf = pattern.partition(".*.")
    if star:
        return f"{head}.*", leaf
    head, _, leaf = pattern.rpartition(".")
    return head, leaf


def _cells(layers: list[PlannedLayer]) -> list[str]:
    """One row after its name; every layer in it has the same sizes and shapes."""
    one = layers[0]
    size = one.size
    if size.tied_to:
        becomes = "tied"
    else:
        becomes = "\n+ ".join(_shape(shape, size.out) for shape in one.groups) or "dense"
    errors = [layer.error for layer in layers if layer.error is not None]
    if size.kind in ("embedding", "position"):
        flops = ["lookup", "lookup"]
    elif one.groups:
        sums = sum(shape.out_features for shape in one.groups[1:])
        flops = [_short(sum(s.flops(order) for s in one.groups) + sums) for order in ("b", "a")]
    else:
        flops = [_short(dense_flops(size.out, size.inner)), ""]
    return [
        str(len(layers)),
        f"{size.out}x{size.inner}",
        becomes,
        f"{sum(layer.weights for layer in layers):,}",
        f"{size.weights / one.weights:.1f}" if one.weights else "",
        *flops,
        f"{sum(errors) / len(errors):.3f}" if errors else "",
    ]


def _shape(shape: KroneckerShape, rows: int) -> str:
    """Without the sizes of a truncated SVD: they are the weight's, or a block's with its rows."""
    if not str(shape).startswith("svd"):
        return str(shape)
    last = shape.start + shape.out_features - 1
    return f"svd({shape.rank})" + (f" {shape.start}-{last}" if partial(shape, rows) else "")


def _short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.{2 if unit == 'G' else 1}f}{unit}"
    return f"{count:.0f}"
