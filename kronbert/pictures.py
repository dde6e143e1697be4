"""The pictures of a report, as PNG without pyplot: learning curve, size and score, weight error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import cos, log10, pi, sin
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from .errors import DataError, near

WIDTH = 7.64
"""Inches: 1100 pixels at 144 dpi."""

NEAR = 4
"""Points between a marker and its label; a label farther off gets a line."""

# Okabe and Ito's colours: told apart by colour-blind readers; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# Set on every picture, so that a user's style cannot make it unreadable.
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.labelcolor": "#222222",
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9.5,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": "#222222",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "text.usetex": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}

# Matrix type -> what follows the layer's number in module names (BERT and RoBERTa, DistilBERT,
# DeBERTa, ViT, ModernBERT, GPT-2); the first that matches the whole name wins.
MATRICES = {
    "query": r".*(query|query_proj|q_lin|q_proj)",
    "key": r".*(key|key_proj|k_lin|k_proj)",
    "value": r".*(value|value_proj|v_lin|v_proj)",
    "query, key, value": r".*(Wqkv|c_attn)",
    "output": r".*att\w*\.(output\.dense|out_lin|Wo|c_proj|o_proj)",
    "feed-forward in": r"(.*intermediate\.dense|.*\.(lin1|Wi|c_fc|fc1))",
    "feed-forward out": r"(output\.dense|.*\.(lin2|Wo|c_proj|fc2))",
}


def learning_curve(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str | None = None,
    teacher_score: float | None = None,
    text: str = "training",
) -> None:
    """Losses per term and the dev score against training steps.

    history: as `transformers.Trainer` logs it (``state.log_history``). metric: what ``eval_*`` to
    draw, by default the first that is no loss or speed; scores are fractions, drawn times 100.
    text: whose losses. Without evaluations only they are drawn; `DataError` without either."""
    losses = _losses(history)
    scored = [row for row in history if any(key.startswith("eval_") for key in row)]
    metric = _metric(scored, metric)
    scores = [
        (row["step"], 100 * row[f"eval_{metric}"]) for row in scored if f"eval_{metric}" in row
    ]
    if not losses and not scores:
        raise DataError(
            "learning_curve: the history holds no loss and no evaluation. Give state.log_history "
            "of a Trainer that has logged."
        )
    panels = bool(losses) + bool(scores)
    with _picture(path, height=2.9 * panels + 0.4) as figure:
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        if losses:
            _draw_losses(axes[0], losses, text)
        if scores:
            _draw_scores(axes[-1], scores, metric or "", teacher_score)
        axes[-1].set_xlabel("training step")
        axes[-1].set_xlim(left=0)


def size_speed_score(
    points: Sequence[Mapping[str, Any]], path: str | Path, *, metric: str = "score"
) -> None:
    """Score against parameters, one labelled marker per model; its area grows with its latency.

    points: name, parameters, score (a fraction, drawn times 100), kind (colour and marker;
    "teacher" is always the same) and latency_ms (None: not measured). No two labels overlap."""
    if not points:
        raise DataError("size_speed_score: no points. Give at least the teacher.")
    kinds = sorted({point["kind"] for point in points}, key=lambda kind: kind != "teacher")
    times = [point["latency_ms"] for point in points if point.get("latency_ms")]
    with _picture(path, height=4.6) as figure:
        axes = figure.subplots()
        sizes = [point["parameters"] / 1e6 for point in points]
        heights = [100 * point["score"] for point in points]
        areas = []
        for point, x, y in zip(points, sizes, heights, strict=True):
            time = point.get("latency_ms")
            colour, marker = _style(kinds.index(point["kind"]))
            areas.append(40 + 460 * time / max(times) if time else 60)
            axes.scatter(
                x,
                y,
                s=areas[-1],
                color=colour,
                marker=marker,
                alpha=0.8,
                edgecolors="white",
                zorder=3,
            )
        for index, kind in enumerate(kinds):
            colour, marker = _style(index)
            axes.plot([], [], linestyle="none", label=kind, color=colour, marker=marker)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        low, high = min(sizes), max(sizes)
        widen = max(1.6, (4 / (high / low)) ** 0.5)
        axes.set_xscale("log")
        axes.set_xlim(low / widen, high * widen)
        _plain_log(axes.xaxis, (1, 2, 5), " M")
        room = max(0.35 * (max(heights) - min(heights)), 1.0)
        axes.set_ylim(min(heights) - room, max(heights) + room)
        axes.set_xlabel("parameters (millions, log scale)")
        axes.set_ylabel(f"{metric} ({_unit(metric)})")
        title = "Size and score: up and left is better"
        axes.set_title(title + ("; larger marker = slower" if times else ""))
        labels = [_label(point) for point in points]
        _place_labels(figure, axes, list(zip(sizes, heights, strict=True)), areas, labels)


def error_per_layer(rows: Mapping[str, float], path: str | Path) -> None:
    """Relative weight error against the layer's number, one line per matrix type.

    rows: module name -> error, as `Report.errors`. What has no number (embeddings, pooler) stands
    as bars at the left."""
    if not rows:
        raise DataError("error_per_layer: no errors. Give those of a report with a teacher.")
    bars: dict[str, float] = {}
    lines: dict[str, dict[int, float]] = {}
    for name, error in rows.items():
        matrix, layer, tail = _matrix(name)
        if layer is None:
            bars[tail if matrix in bars else matrix] = error
        else:
            # Four feed-forward blocks a layer (MobileBERT), layers on two sides (T5).
            sided = re.sub(rf"\.{layer}\.", ".", name, count=1)
            free = (one for one in (matrix, tail, sided) if layer not in lines.get(one, {}))
            lines.setdefault(next(free), {})[layer] = error
    with _picture(path, height=4.3) as figure:
        widths = [max(1.0, 0.55 * len(bars))] * bool(bars) + [5.0] * bool(lines)
        panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        if bars:
            _draw_bars(panels[0], bars)
        if lines:
            _draw_lines(panels[-1], lines)
        panels[0].set_ylabel("relative error of the weight")
        figure.suptitle(
            "Distance of the student's weights from the teacher's:  ||S − T|| / ||T||",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )


@contextmanager
def _picture(path: str | Path, height: float) -> Iterator[Figure]:
    """A figure that is written to ``path``; matplotlib's own settings are as before afterwards."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=144, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, dpi=144, format="png")


def _losses(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Term -> (step, loss); the total alone where no terms were logged."""
    terms: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith("loss_") and value > 0:
                terms.setdefault(key.removeprefix("loss_"), []).append((row["step"], value))
    if not terms:
        total = [(row["step"], row["loss"]) for row in history if row.get("loss", 0) > 0]
        return {"total": total} if total else {}
    return terms


def _metric(scored: Sequence[Mapping[str, Any]], metric: str | None) -> str | None:
    keys = dict.fromkeys(key for row in scored for key in row if key.startswith("eval_"))
    skipped = re.compile(r"eval_(loss|runtime|\w+_per_second|\w*time)")
    known = tuple(key.removeprefix("eval_") for key in keys if not skipped.fullmatch(key))
    if metric is None:
        return known[0] if known else None
    if scored and f"eval_{metric}" not in keys:
        raise DataError(f"learning_curve: no evaluation logs {metric!r}. {near(metric, known)}")
    return metric


def _draw_losses(axes: Axes, losses: Mapping[str, list[tuple[int, float]]], text: str) -> None:
    for index, (term, curve) in enumerate(losses.items()):
        colour, marker = _style(index)
        axes.plot(
            *zip(*curve, strict=True),
            color=colour,
            marker=marker,
            markersize=4,
            markevery=max(1, len(curve) // 10),
            linewidth=1.4,
            label=term,
        )
    values = [loss for curve in losses.values() for _, loss in curve]
    axes.set_yscale("log")
    decades = log10(max(values) / min(values))
    _plain_log(axes.yaxis, (1,) if decades > 3 else (1, 2, 5) if decades > 0.5 else range(1, 10))
    axes.set_ylabel(f"{text} loss (log scale)")
    axes.set_title("Loss, each term before its weight" if len(losses) > 1 else "Loss")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_scores(
    axes: Axes, scores: list[tuple[int, float]], metric: str, teacher: float | None
) -> None:
    axes.plot(
        *zip(*scores, strict=True), color=COLOURS[0], marker="o", markersize=5, label="student"
    )
    title = f"Dev set: student ends at {scores[-1][1]:.1f}"
    if teacher is not None:
        axes.axhline(100 * teacher, color=COLOURS[1], linestyle="--", label="teacher")
        title += f", teacher {100 * teacher:.1f}"
    axes.set_ylabel(f"{metric} ({_unit(metric)})")
    axes.set_title(title)
    axes.margins(y=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_bars(axes: Axes, bars: Mapping[str, float]) -> None:
    places = range(len(bars))
    axes.bar(places, list(bars.values()), color="#8C8C8C", width=0.65)
    for place, error in zip(places, bars.values(), strict=True):
        axes.annotate(f"{error:.2f}", (place, error), (0, 2), textcoords="offset points",
                      ha="center", fontsize=8.5)  # fmt: skip
    axes.set_ylim(0, max(1.0, 1.08 * max(bars.values())))
    axes.set_title("Outside the layers", fontsize=9.5, fontweight="normal")
    names = [name.replace(" ", "\n") for name in bars]
    axes.set_xticks(places, names, rotation=35, ha="right", rotation_mode="anchor")
    axes.grid(axis="x", visible=False)


def _draw_lines(axes: Axes, lines: Mapping[str, Mapping[int, float]]) -> None:
    """On a scale of their own: the matrices of a model differ by a few hundredths."""
    order = [*MATRICES, *sorted(set(lines) - set(MATRICES))]
    for index, matrix in enumerate(order):
        curve = sorted(lines.get(matrix, {}).items())
        colour, marker = _style(index)
        if curve:
            axes.plot(
                *zip(*curve, strict=True),
                color=colour,
                marker=marker,
                markersize=5.5,
                label=matrix,
            )
    errors = [error for curve in lines.values() for error in curve.values()]
    middle, half = (min(errors) + max(errors)) / 2, (max(errors) - min(errors)) / 2
    reach = max(1.15 * half, 0.05)  # never so near that noise looks like a difference
    low = max(0.0, middle - reach)
    axes.set_ylim(low, middle + reach)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("layer (0 = next to the embeddings)")
    starts = f" (scale starts at {low:.2f})" if low > 0.005 else ""
    axes.set_title(f"Layers{starts}", fontsize=9.5, fontweight="normal")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _matrix(name: str) -> tuple[str, int | None, str]:
    """(matrix type, layer number, rest of the name); outside numbered layers (short name, None,
    name)."""
    numbered = re.search(r"\.(\d+)\.(.+)$", name)
    if numbered is None:
        parts = [part for part in name.split(".") if part not in ("dense", "embeddings")]
        short = (parts or [name])[-1].removesuffix("_embeddings").replace("_", " ")
        return short, None, name
    layer, tail = numbered.groups()
    kinds = (kind for kind, pattern in MATRICES.items() if re.fullmatch(pattern, tail))
    return next(kinds, tail), int(layer), tail


def _style(index: int) -> tuple[str, str]:
    """Colour and marker; no pair comes twice among the first 64."""
    turn, place = divmod(index, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]


def _unit(metric: str) -> str:
    """Matthews and Spearman run from -1 to 1, so they are no percentages."""
    return "%" if re.search(r"accuracy|f1", metric, re.IGNORECASE) else "× 100"


def _plain_log(axis: Any, steps: Sequence[int], unit: str = "") -> None:
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _label(point: Mapping[str, Any]) -> str:
    time = point.get("latency_ms")
    size = f"{point['parameters'] / 1e6:.3g} M"
    return f"{point['name']}\n{size}" + (f", {time:.3g} ms" if time else "")


def _place_labels(
    figure: Figure,
    axes: Axes,
    places: list[tuple[float, float]],
    areas: list[float],
    labels: list[str],
) -> list[Any]:
    """Put each label at the nearest free spot around its marker, with a line where that is far."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes must not move under the labels
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    dot = figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    centres = [axes.transData.transform(place) for place in places]
    radii = [dot * area**0.5 / 2 for area in areas]
    taken = [
        Bbox([centre - radius, centre + radius])
        for centre, radius in zip(centres, radii, strict=True)
    ]
    texts = []
    for place, centre, radius, label in zip(places, centres, radii, labels, strict=True):
        text = axes.annotate(label, place, (0, 0), textcoords="offset points", fontsize=8.5,
                             ha="center", va="center", zorder=4)  # fmt: skip
        box = text.get_window_extent(renderer)
        distance, spot = _free_spot(box, radius, dot, frame, taken)
        text.set_position(((spot.x0 - box.x0) / dot, (spot.y0 - box.y0) / dot))
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5})
        taken.append(spot)
        if distance > NEAR:
            edge = np.clip(centre, spot.min, spot.max)
            axes.annotate(
                "",
                place,
                (edge - centre) / dot,
                textcoords="offset points",
                zorder=2,
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.8},
            )
        texts.append(text)
    return texts


def _free_spot(
    box: Bbox, radius: float, dot: float, frame: Bbox, taken: Sequence[Bbox]
) -> tuple[float, Bbox]:
    """(distance in points, place) nearest to its marker where ``box`` meets nothing else.

    box: the label, centred on a marker of ``radius`` pixels. Ends with the least crowded place."""
    spots: list[tuple[int, float, Bbox]] = []
    for distance in (NEAR, 14, 26, 40, 60, 85, 115, 150, 190, 240):
        for step in range(16):
            angle = pi * step / 8
            across = cos(angle) * (radius + distance * dot + box.width / 2)
            up = sin(angle) * (radius + distance * dot + box.height / 2)
            spot = box.translated(across, up)
            hits = sum(spot.padded(1.5 * dot).overlaps(other) for other in taken)
            inside = frame.x0 < spot.x0 and spot.x1 < frame.x1
            inside &= frame.y0 < spot.y0 and spot.y1 < frame.y1
            if inside and not hits:
                return distance, spot
            spots.append((hits + 100 * (not inside), distance, spot))
    return min(spots, key=lambda one: one[:2])[1:]
