"""The picture of the GLUE study: what students keep of their teachers' scores, by factor."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import matplotlib
import study_settings as settings  # type: ignore[import-not-found]
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from study_results import Results, Spread  # type: ignore[import-not-found]

from kronbert.pictures import COLOURS, MARKERS, STYLE, WIDTH

FLOOR, TOP = 60.0, 108.0
"""Percent at which axes end: what keeps less stands on the floor, with its number above it."""

APART, MARGIN = 1.04, 1.25
"""Kinds of one factor stand so many times it beside each other, or whiskers hide one another; the
axis ends MARGIN times it beyond the outer ones."""


def retention_picture(results: Results, path: Path) -> bool:
    """One panel per full task and one of their mean: student / teacher against the factor, a line
    per kind through the means over seeds, a small dot per seed, whiskers of one standard error for
    want of more dev rows where it is known. False: nothing to draw, no picture."""
    factors = results.factors()
    kinds = [
        kind
        for kind in settings.KINDS
        if any(results.retained(kind, f, task) for f in factors for task in settings.FULL)
    ]
    if not kinds:
        return False
    with matplotlib.rc_context(), matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6.2), dpi=144, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
        for axes, task in zip(panels, [*settings.FULL, None], strict=True):
            for index, kind in enumerate(kinds):
                _line(axes, results, kind, task, index, (len(kinds) - 1) / 2)
            axes.set_title(task or "mean of the five")
            axes.set_xscale("log")
            axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.axhline(100, color="#666666", linewidth=0.8)
            axes.set_xlim(min(factors) / MARGIN, max(factors) * MARGIN)
            axes.set_ylim(FLOOR, TOP)
        figure.axes[4].set_xlabel("parameters of the teacher / student")
        figure.supylabel("score of the teacher kept on the dev set (%)", fontsize=10)
        lines = {label: one for axes in figure.axes for one, label in zip(
            *axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    return True


def _line(
    axes: Axes, results: Results, kind: str, task: str | None, index: int, middle: float
) -> None:
    """Of one kind in one panel; a task of None is the mean of all. Left out where not measured."""
    style: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
    }
    at, means, errors = [], [], []
    for factor in results.factors():
        seeds = list(results.retained(kind, factor, task).values()) if task else []
        spread = Spread.over(seeds) if task else results.mean_retained(kind, factor)
        if spread is None:
            continue
        error = (
            results.retention_error(kind, factor, task)
            if task
            else results.mean_retention_error(kind, factor)
        )
        place, kept = factor * APART ** (index - middle), 100 * spread.mean
        at.append(place)
        means.append(kept if kept >= FLOOR else nan)
        errors.append(100 * (error or 0.0))
        if kept < FLOOR:
            axes.plot([place], [FLOOR], markersize=5, mfc="white", clip_on=False, zorder=4, **style)
            axes.annotate(
                f"{kept:.0f}", (place, FLOOR), (0, 6), textcoords="offset points", ha="center",
                fontsize=8, color=style["color"],
            )  # fmt: skip
        elif len(seeds) > 1:
            dots = [100 * one for one in seeds]
            axes.plot([place] * len(dots), dots, ".", markersize=3, color="#222222", zorder=4)
    if at:
        label = settings.KINDS[kind].replace("**", "")
        axes.errorbar(
            at, means, yerr=errors, label=label, capsize=2, linewidth=1, markersize=5, **style
        )
