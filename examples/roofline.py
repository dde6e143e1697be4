"""The roofline of one linear map, and its time beside the floor that memory and arithmetic set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kronbert.pictures import COLOURS, STYLE

MARKERS = {"attention": "o", "expand": "s", "contract": "^"}
PRESETS = {"k5": COLOURS[2], "k8": COLOURS[0], "k21": COLOURS[1]}
DENSE = "#8A8A8A"
INK = "#222222"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MANY = 4096
"""Rows of the filled markers and of the lower panels; their activations are larger than a cache."""


def floor_ms(flops: float, moved: float, peak: Mapping[str, float]) -> float | None:
    """The least time the machine needs, by arithmetic or by memory; None without its rates."""
    if not {"flop_per_s", "bytes_per_s"} <= peak.keys():
        return None
    return 1e3 * max(flops / peak["flop_per_s"], moved / peak["bytes_per_s"])


def draw(rows: Mapping[str, Any], path: Path) -> None:
    """rows: the section "micro" of speed_cpu.json, with the machine's rates among them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 9.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2, sharex="row", height_ratios=(1, 1.05))
        for i, (dtype, title) in enumerate(DTYPES.items()):
            peak = rows.get(f"machine {dtype}", {})
            chosen = forward_rows(rows, dtype)
            axes[0, i].set_title(f"{title}: rate reached")
            roofline(axes[0, i], chosen, peak)
            axes[1, i].set_title(f"{title}: time of {MANY:,} rows")
            ladder(axes[1, i], chosen, peak)
        figure.legend(handles=legend(), loc="outside lower center", ncols=5, fontsize=9)
        figure.savefig(path, dpi=110)


def forward_rows(rows: Mapping[str, Any], dtype: str) -> list[tuple[str, str, int, Any]]:
    """(preset, layer, rows, measured row) of each map timed forward in this dtype."""
    found = []
    for case, row in rows.items():
        match = re.fullmatch(r"(\S+) (\S+) (\d+) rows (\w+) forward", case)
        if match is not None and match[4] == dtype and "ms" in row:
            found.append((match[1], match[2], int(match[3]), row))
    return found


def roofline(
    axes: Axes, chosen: list[tuple[str, str, int, Any]], peak: Mapping[str, float]
) -> None:
    """Per map one point for kronbert and one for the dense product, under the roof."""
    intensities = []
    for name, layer, count, row in chosen:
        for who, prefix, colour in (
            ("nn.Linear", "dense_", DENSE),
            ("kronbert", "", PRESETS[name]),
        ):
            intensity = row[f"{prefix}flops"] / row[f"{prefix}bytes"]
            reached = row[f"{prefix}flops"] / row["ms"][who]["median_ms"] / 1e6
            axes.plot(
                intensity, reached, MARKERS[layer], color=colour, ms=7.5, mew=1.6,
                mfc=colour if count == MANY else "white", zorder=3 if who == "kronbert" else 2,
            )  # fmt: skip
            intensities.append(intensity)
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    if intensities and "flop_per_s" in peak:
        roof(axes, min(intensities) / 1.6, max(intensities) * 1.6, peak)
    for axis in (axes.xaxis, axes.yaxis):
        plain(axis, 2.0, 5.0)


def roof(axes: Axes, low: float, high: float, peak: Mapping[str, float]) -> None:
    """Memory's slope and arithmetic's ceiling, with the rates measured."""
    top, slope = peak["flop_per_s"] / 1e9, peak["bytes_per_s"] / 1e9
    corner = min(max(top / slope, low), high)
    x = [low, corner, high]
    axes.plot(x, [min(top, slope * one) for one in x], color=INK, lw=1.4, zorder=1)
    axes.annotate(
        f"dense product {top:,.0f} GFLOP/s", (high, top), (0, 5), textcoords="offset points",
        ha="right", fontsize=8.5,
    )  # fmt: skip
    if low < corner:
        axes.annotate(
            f"copy {slope:.0f} GB/s", (low, slope * low), (2, -5), textcoords="offset points",
            ha="left", va="top", fontsize=8.5,
        )  # fmt: skip
    axes.margins(y=0.12)


def ladder(axes: Axes, chosen: list[tuple[str, str, int, Any]], peak: Mapping[str, float]) -> None:
    """A line per map: the floor, kronbert, and every peer that was timed."""
    lines = [row for row in chosen if row[2] == MANY]
    for y, (name, layer, _, row) in enumerate(lines):
        times = {who: timing["median_ms"] for who, timing in row["ms"].items()}
        floor = floor_ms(row["flops"], row["bytes"], peak)
        ours = times.pop("kronbert")
        if floor is not None:
            axes.plot([floor, ours], [y, y], color=PRESETS[name], lw=2, alpha=0.35, zorder=1)
            axes.plot(floor, y, "|", color=INK, ms=15, mew=2, zorder=2)
        dense = times.pop("nn.Linear", None)
        axes.plot(list(times.values()), [y] * len(times), "x", color="#B5B5B5", ms=5, zorder=1)
        if dense is not None:
            axes.plot(dense, y, MARKERS[layer], color=DENSE, ms=7.5, zorder=2)
        axes.plot(ours, y, MARKERS[layer], color=PRESETS[name], ms=8.5, zorder=3)
    axes.set_yticks(range(len(lines)), [f"{name} {layer}" for name, layer, _, _ in lines])
    axes.invert_yaxis()
    axes.set_xlabel("ms, less is better")
    axes.set_xscale("log")
    axes.grid(axis="y", visible=False)
    plain(axes.xaxis, 3.0)


def plain(axis: Any, *between: float) -> None:
    """Ticks at 1 and ``between`` of each decade, in plain numbers: the style sets no formulas."""
    axis.set_major_locator(LogLocator(subs=(1.0, *between)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def legend() -> list[Line2D]:
    def mark(label: str, marker: str, colour: str, face: str | None = None) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, mfc=face or colour, label=label)

    found = [mark(f"kronbert {name}", "D", colour) for name, colour in PRESETS.items()]
    found += [mark("nn.Linear", "D", DENSE), mark("other peers", "x", "#B5B5B5")]
    found += [mark(layer, marker, INK) for layer, marker in MARKERS.items()]
    found.append(mark("128 rows, in cache", "o", INK, "white"))
    floor = Line2D([], [], ls="", marker="|", ms=12, mew=2, color=INK, label="floor")
    return [*found, floor]
