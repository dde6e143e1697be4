"""The tables of the GLUE study, from the JSON that its --collect wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import study_settings as settings  # type: ignore[import-not-found]
from study_results import Results, Spread, score_of  # type: ignore[import-not-found]

NONE = "not measured"
SCORES, OUTSIDE = "scores", "outside"
FEW_COMMITS = 3
"""As many are named below a table."""


def read(path: Path) -> Results:
    """The collected results; none where there is no such file."""
    empty: dict[str, Any] = {"limit": None, "teachers": [], "runs": []}
    return Results(json.loads(path.read_text()) if path.is_file() else empty)


def full_tasks(results: Results) -> str:
    """The five tasks with their whole data, and the mean over them."""
    return _table(results, settings.FULL, mean=True)


def kept(results: Results) -> str:
    """What students keep of their teachers' scores, task by task; those with all five tasks."""
    lines = _head(["factor", "student", *settings.FULL, "mean kept"])
    empty = len(lines)
    for factor in results.factors():
        for kind, title in settings.KINDS.items():
            if results.mean_retained(kind, factor) is None:
                continue
            spreads = (
                Spread.over(list(results.retained(kind, factor, task).values()))
                for task in settings.FULL
            )
            cells = ["" if one is None else f"{100 * one.mean:.1f} %" for one in spreads]
            lines.append(_row([f"{factor:g}", title, *cells, _kept_mean(results, kind, factor)]))
    return "\n".join(lines) if len(lines) > empty else NONE


def agreement(results: Results) -> str:
    """How far students answer as their teachers do on dev rows, right or wrong."""
    lines = _head(["factor", "student", *settings.FULL])
    empty = len(lines)
    for factor in results.factors():
        for kind, title in settings.KINDS.items():
            cells = [_agreed(results, kind, factor, task) for task in settings.FULL]
            if any(cell != NONE for cell in cells):
                lines.append(_row([f"{factor:g}", title, *cells]))
    return "\n".join(lines) if len(lines) > empty else NONE


def _agreed(results: Results, kind: str, factor: float, task: str, tag: str = settings.MAIN) -> str:
    runs = results.of(kind, factor, task, tag).values()
    found = [next(iter(run["fidelity"].values())) for run in runs if run.get("fidelity")]
    if not found:
        return NONE
    means = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    if "agreement" in means:
        return f"{100 * means['agreement']:.1f} %, {means['kl']:.3f}"
    return f"{means['correlation']:.3f}, {means['rmse']:.2f} off"


def subsets(results: Results) -> str:
    """Tasks apart: trained, and partly scored, on subsets."""
    return _table(results, settings.PARTIAL, mean=False)


def outside(results: Results) -> str:
    """Students on texts of another origin than their training data."""
    tasks = tuple(settings.OUTSIDE)
    titles = [
        _task_title(results, task).replace(task, f"{task} on {settings.OUTSIDE[task][0]}", 1)
        for task in tasks
    ]
    return _table(results, tasks, mean=False, sets=OUTSIDE, titles=titles)


def _table(
    results: Results,
    tasks: tuple[str, ...],
    *,
    mean: bool,
    sets: str = SCORES,
    titles: list[str] | None = None,
) -> str:
    """Students without a run of any of ``tasks`` are named below the table, but for kinds that are
    made on request alone."""
    if not any(task in results.teachers for task in tasks):
        return NONE
    heads = titles or [_task_title(results, task) for task in tasks]
    lines = _head(["factor", "student", "parameters", *heads, *(["mean", "kept"] if mean else [])])
    full = {task: results.teacher(task, sets) for task in tasks}
    cells = [_of_teachers(full[task]) for task in tasks]
    sizes = sorted({row["parameters"] for t, row in results.teachers.items() if t in tasks})
    means = [None if one is None else one.mean for one in full.values()]
    lines.append(_row(["1", "teacher", _size(sizes), *cells, *_of_mean(means, mean)]))
    if sets == SCORES:
        base = {task: _commonest(results, task) for task in tasks}
        cells = [_commonest_cell(results, task, base[task]) for task in tasks]
        lines.append(_row(["", "always the commonest class", "", *cells, *(["", ""] * mean)]))
    missing: dict[str, tuple[str, ...]] = {}
    for factor in results.factors():
        for kind, title in settings.KINDS.items():
            if not any(results.scores(kind, factor, task, sets=sets) for task in tasks):
                if kind not in settings.STAGE1:
                    missing[title] = (*missing.get(title, ()), f"{factor:g}")
                continue
            cells = [
                _cell(
                    Spread.over(list(results.scores(kind, factor, task, sets=sets).values())),
                    Spread.over(list(results.retained(kind, factor, task, sets=sets).values())),
                    results.retention_error(kind, factor, task) if sets == SCORES else None,
                )
                for task in tasks
            ]
            if mean:
                cells.append(_plain(results.mean_score(kind, factor)))
                cells.append(_kept_mean(results, kind, factor))
            size = _size(results.parameters(kind, factor, tasks))
            lines.append(_row([f"{factor:g}", title, size, *cells]))
    left_out = "".join(
        f" Without a run yet at factor {' and '.join(at)}: "
        f"{'; '.join(title for title, places in missing.items() if places == at)}."
        for at in dict.fromkeys(missing.values())
    )
    return "\n".join([*lines, "", _notes(results, tasks, sets, mean=mean) + left_out])


def ablations(results: Results) -> str:
    """Every variant below the runs of the same kind and factor that it is held against, the main
    ones or what `study_settings.BESIDE` says: scores, differences on the seeds that both have, and
    agreement with the teacher; scores on texts of another origin."""
    variants = sorted(
        {(r["student"], r["factor"], r["tag"]) for r in results.runs if r["tag"] != settings.MAIN}
    )
    if not variants:
        return NONE
    tagged = [row for row in results.runs if row["tag"] != settings.MAIN]
    seen = {row["task"] for row in tagged}
    tasks = [task for task in (*settings.FULL, *settings.PARTIAL) if task in seen]
    seen = {row["task"] for row in tagged if row.get(OUTSIDE)}
    away = [task for task in settings.OUTSIDE if task in seen]
    heads = [_task_title(results, task) for task in tasks]
    heads += [f"{task} on {settings.OUTSIDE[task][0]}" for task in away]
    lines = _head(["factor", "student", "variant", "changed", *heads])
    for kind, factor in dict.fromkeys((kind, factor) for kind, factor, _ in variants):
        own = [tag for k, f, tag in variants if (k, f) == (kind, factor)]
        for tag in (settings.MAIN, *sorted(own, key=lambda tag: _place(tag, own))):
            cells = [_beside(results, kind, factor, task, tag) for task in tasks]
            cells += [_beside(results, kind, factor, task, tag, OUTSIDE) for task in away]
            changed = _changes(results, kind, factor, tag)
            said = f"`{changed}`" if changed not in ("", "{}") else ""
            lines.append(_row([f"{factor:g}", settings.KINDS[kind], tag, said, *cells]))
    return "\n".join([*lines, "", _notes(results, tuple(tasks), SCORES, every=True)])


def _place(tag: str, own: Sequence[str]) -> tuple[str, bool, str]:
    """Sorts variants of the main runs first, then those of others among ``own``, below these."""
    heads = {*settings.BESIDE.values(), settings.READ_TWICE}
    named = (tag,) if tag in heads else _named(tag)
    base = next((one for one in named if one in (settings.MAIN, *own)), settings.MAIN)
    return "" if base == settings.MAIN else base, tag != base, tag


def _named(tag: str) -> tuple[str, ...]:
    """The tags of the runs that a variant is held against, the first of which it has runs."""
    return (settings.BESIDE.get(tag, settings.READ_TWICE), settings.READ_TWICE)


def _base(results: Results, kind: str, factor: float, task: str, tag: str) -> str:
    """The tag of the runs that a variant is held against."""
    found = (one for one in _named(tag) if one != tag and results.of(kind, factor, task, one))
    return next(found, settings.MAIN)


def _beside(
    results: Results, kind: str, factor: float, task: str, tag: str, sets: str = SCORES
) -> str:
    """A variant's score, what it has gained on the runs that it is held against, and how far it
    answers as its teacher does."""
    scores = results.scores(kind, factor, task, tag, sets)
    said = _plain(Spread.over(list(scores.values())))
    if tag != settings.MAIN:
        base = results.scores(kind, factor, task, _base(results, kind, factor, task, tag), sets)
        both = sorted(set(scores) & set(base))
        gain = Spread.over([scores[seed] - base[seed] for seed in both])
        said += "" if gain is None else f" ({100 * gain.mean:+.1f})"
    agreed = _agreed(results, kind, factor, task, tag) if sets == SCORES else NONE
    return said if agreed == NONE else f"{said}; {agreed}"


def _changes(results: Results, kind: str, factor: float, tag: str) -> str:
    """What differs from the runs it is held against: the same for every run, or all of them."""

    def base(task: str) -> Mapping[int, Mapping[str, Any]]:
        return results.of(kind, factor, task, _base(results, kind, factor, task, tag))

    found = {
        json.dumps(_changed(row, base(row["task"])))
        for row in results.runs
        if (row["student"], row["factor"], row["tag"]) == (kind, factor, tag)
    }
    return " or ".join(sorted(found))


def _changed(row: Mapping[str, Any], base: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """A run's changes; of whole stages only what the run of its seed (else any) in ``base`` has
    otherwise, but for `Stage.cache_teacher`, which changes no result."""
    changes = dict(row["changes"])
    if "stages" not in changes or not base:
        return changes
    beside = base.get(row["seed"], next(iter(base.values())))
    usual = {one["name"]: one for one in beside["stages"]}
    for stage in changes.pop("stages"):
        before = usual.get(stage["name"], {})
        other = {key: value for key, value in stage.items() if before.get(key) != value}
        other.pop("cache_teacher", None)
        changes |= {f"{stage['name']} {key}": value for key, value in other.items()}
    return changes


def _head(names: list[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _task_title(results: Results, task: str) -> str:
    row = results.teachers.get(task)
    if row is None:
        return task
    return f"{task}{' (subset)' if row['subset'] else ''}, {row['metric']}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _of_teachers(spread: Spread | None) -> str:
    if spread is None or spread.spread is None:
        return _percent(None if spread is None else spread.mean)
    return f"{_plain(spread)} ({spread.seeds} teachers)"


def _plain(spread: Spread | None, unit: str = "") -> str:
    if spread is None:
        return NONE
    several = spread.most not in (None, spread.seeds)
    seeds = f" ({spread.seeds} to {spread.most} seeds)" if several else ""
    if spread.spread is None:
        return f"{100 * spread.mean:.1f}{unit}{seeds or ' (1 seed)'}"
    return f"{100 * spread.mean:.1f} ± {100 * spread.spread:.1f}{unit}{seeds}"


def _cell(score: Spread | None, kept: Spread | None, error: float | None) -> str:
    if kept is None:
        return _plain(score)
    said = f"{_plain(score)}, {100 * kept.mean:.1f} %"
    return said if error is None else f"{said} (± {100 * error:.1f})"


def _kept_mean(results: Results, kind: str, factor: float) -> str:
    said = _plain(results.mean_retained(kind, factor), " %")
    error = results.mean_retention_error(kind, factor)
    return said if error is None else f"{said} (± {100 * error:.1f})"


def _size(sizes: list[int]) -> str:
    if not sizes:
        return NONE
    few, most = f"{sizes[0] / 1e6:.3f}", f"{sizes[-1] / 1e6:.3f}"
    return f"{few} M" if few == most else f"{few} to {most} M"


def _of_mean(values: Iterable[float | None], shown: bool) -> list[str]:
    if not shown:
        return []
    known = [value for value in values if value is not None]
    whole = len(known) == len(settings.FULL)
    return [_percent(sum(known) / len(known)) if whole else NONE, "100 %" if whole else NONE]


def _commonest(results: Results, task: str) -> float | None:
    row = results.teachers.get(task)
    return None if row is None else score_of({**row, SCORES: row["commonest"]})


def _commonest_cell(results: Results, task: str, score: float | None) -> str:
    if score is None:
        return "no classes" if task in results.teachers else NONE
    return _percent(score)


def _machine(row: Mapping[str, Any]) -> str:
    return str(row["machine"]) + (", bf16 autocast" if row.get("precision") == "bf16" else "")


def _notes(
    results: Results, tasks: tuple[str, ...], sets: str, *, mean: bool = False, every: bool = False
) -> str:
    """Where the figures come from: data, seeds, machines, versions and commits; of the main runs,
    or of variants as well."""
    teachers = [row for row in results.every_teacher if row["task"] in tasks]
    tags = {row["tag"] for row in results.runs} if every else {settings.MAIN}
    runs = [row for row in results.runs if row["task"] in tasks and row["tag"] in tags]
    rows = [*teachers, *runs]
    data = "outside_data" if sets == OUTSIDE else "data"
    erring = sets == SCORES and any(row.get("retention_error") is not None for row in runs)
    seeds = sorted({row["seed"] for row in runs})
    starts = sorted({row["start"]["name"] for row in runs if row["start"]})
    learnt = {
        task: sorted({row["rows"] for row in runs if row["task"] == task and "rows" in row})
        for task in tasks
    }
    said = [
        "Scores of the last step"
        + (" on dev sets" if sets == SCORES else " on texts of another origin")
        + "; mean ± standard deviation over seeds"
        + (f" {', '.join(map(str, seeds))}" if seeds else "")
        + "; percent: student / its teacher"
        + (", in brackets the standard error of it for want of more rows." if erring else ".")
        + (" Deviations of the mean are those of the tasks, taken as independent." * mean),
        f"Data: {_list(rows, lambda row: _files(row.get(data)))}.",
        f"Started from: {', '.join(starts) or 'no stage-1 student'}.",
        f"Machines: {_list(rows, _machine)}; torch "
        f"{_list(rows, lambda row: row['versions']['torch'])}, transformers "
        f"{_list(rows, lambda row: row['versions']['transformers'])}; "
        f"{_commits(row['commit'] for row in rows)}.",
    ]
    if sets == SCORES and any(learnt.values()):
        counts = "; ".join(
            f"{task} {' or '.join(f'{count:,}' for count in found)}"
            for task, found in learnt.items()
            if found
        )
        said.insert(2, f"Rows of which students learnt: {counts}.")
    if any("scored_at" in row for row in rows):
        scored = _commits(row["scored_at"] for row in rows if "scored_at" in row)
        said.append(f"Some scored again, from the saved models: {scored}.")
    if results.content["limit"] is not None:
        said.append(f"A trial: at most {results.content['limit']} training rows.")
    return " ".join(said)


def _commits(found: Iterable[str]) -> str:
    """A few by name; of many their number, as the JSON has each run's."""
    names = sorted({commit[:8] for commit in found})
    if len(names) > FEW_COMMITS:
        return f"{len(names)} commits, in the JSON run by run"
    return f"{'commit' if len(names) == 1 else 'commits'} {', '.join(names)}"


def _files(data: str | None) -> str | None:
    """What a run read, without the number of rows without a label, which counts say."""
    return data and re.sub(r"; \d+ rows without a label", "", data)


def _list(rows: list[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], str | None]) -> str:
    return "; ".join(sorted({found for row in rows if (found := of(row))})) or NONE
