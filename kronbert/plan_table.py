"""A `Plan` as a rich table: one row for layers that share a name pattern and shapes."""

from __future__ import annotations

import io
import re
from itertools import compress, groupby
from typing import TYPE_CHECKING, Any

from .shapes import Groups, KroneckerShape, dense_flops, partial

if TYPE_CHECKING:
    from .planning import Plan, PlannedLayer

COLUMNS = ("layer", "n", "weight", "becomes", "parameters", "ratio", "b first", "a first", "error")
WIDE = ("weight", "b first", "a first")


def rows(plan: Plan) -> list[tuple[str, list[PlannedLayer]]]:
    """(pattern, layers): names that differ only in their numbers, with the same shapes."""
    found: dict[tuple[str, Groups], list[PlannedLayer]] = {}
    for layer in plan.layers:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.size.name)
        found.setdefault((pattern, layer.groups), []).append(layer)
    return [(pattern, layers) for (pattern, _), layers in found.items()]


class Renderable:
    """A plan for rich: as many columns as the console has room for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield renderable(self.plan, left_out=WIDE if options.max_width < 100 else ())


def renderable(plan: Plan, left_out: tuple[str, ...] = ()) -> Any:
    """The table, and under it the totals per group and of the model; fits 100 columns, or 80
    with the columns `WIDE` left out."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1)}
    table = Table(collapse_padding=True, **style)
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
    groups = Table(**style)
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
    title = f"{plan.model_type or 'model'}: {plan.factor:.2f} times smaller"
    total = (
        f"{plan.dense_parameters:,} -> {plan.parameters:,} parameters; FLOPs of the linear layers "
        f"at sequence 128:\n{_short(plan.linear_flops(dense=True))} -> "
        f"{_short(plan.linear_flops())}."
    )
    if "a first" not in left_out:
        total += " Columns a first, b first: FLOPs per token of either order."
    return Group(title, table, groups, total)


def render(plan: Plan, width: int = 100) -> str:
    """The table as plain text."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_jupyter=False).print(Renderable(plan))
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
        becomes = " + ".join(_shape(shape, size.out) for shape in one.groups) or "dense"
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
    """Without the sizes of a truncated SVD: the weight's column has them, but for a block's."""
    if not str(shape).startswith("svd"):
        return str(shape)
    last = shape.start + shape.out_features - 1
    return f"svd({shape.rank})" + (f" rows {shape.start} to {last}" if partial(shape, rows) else "")


def _short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.{2 if unit == 'G' else 1}f}{unit}"
    return f"{count:.0f}"
