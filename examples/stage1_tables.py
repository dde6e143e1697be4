"""Tables of what comes before a task: word tables, stage 1; from their scripts' JSON."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

NONE = "not measured"


def stage1(path: Path) -> str:
    """Held-out errors of every structure at the start and at the end, and what it costs."""
    if not path.is_file():
        return NONE
    content = json.loads(path.read_text())
    rows = content["rows"]
    lines = [
        "| factor | structure | optimiser, rate | parameters | MFLOPs per token | "
        "hidden states, start | end | embedding, end | training |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(row) for row in rows),
        "",
        _notes(content),
    ]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    start, end = row["points"][0], row["points"][-1]
    cells = [
        f"{row['factor']:g}",
        row["variant"],
        f"{'Muon' if row['muon_rate'] else 'AdamW'}, {row['learning_rate']:g}",
        f"{row['parameters'] / 1e6:.3f} M",
        f"{row['flops_per_token'] / 1e6:.2f}",
        f"{start['loss_ffn']:.3f}",
        f"{end['loss_ffn']:.3f}",
        f"{end['loss_embedding']:.3f}",
        f"{row['seconds'] / 60:.1f} min",
    ]
    return "| " + " | ".join(cells) + " |"


def _notes(content: dict[str, Any]) -> str:
    rows = content["rows"]

    def each(key: str) -> str:
        return "; ".join(sorted({str(row[key]) for row in rows}))

    commits = "; ".join(sorted({row["commit"][:8] for row in rows}))
    steps = sorted({row["points"][-1]["step"] for row in rows})
    return (
        f"Held-out mean squared error of the hidden states, summed over the layers, and of the "
        f"embedding's output, after {', '.join(map(str, steps))} steps of 32 blocks of 128 tokens; "
        f"{each('data')}. Seed {each('seed')}; one thread beside other work, so the times are "
        f"rough; {each('machine')}; commits {commits}; `{content['command']}`."
    )


def sentences(path: Path) -> str:
    """What students of a sentence encoder keep of it, by sentence_study.py."""
    if not path.is_file():
        return NONE
    content = json.loads(path.read_text())
    lines = [
        "| model | parameters | likeness, Spearman | search: answer found first | among ten | "
        "cosine with the teacher's |",
        "|---|---|---|---|---|---|",
    ]
    teacher = content["rows"][0]
    for row in content["rows"]:
        cells = [row["name"], f"{row['parameters'] / 1e6:.2f} M"]
        for key in ("spearman", "first", "among_ten"):
            share = "" if row is teacher else f", {100 * row[key] / teacher[key]:.0f} %"
            cells.append(f"{100 * row[key]:.1f}{share}")
        lines.append("| " + " | ".join([*cells, f"{row['cosine']:.3f}"]) + " |")
    said = (
        f"Without training on a task, in float32. Likeness: {content['pairs']:,} pairs of STS-B's "
        f"dev set. Search: {content['questions']:,} questions of QNLI's dev set among the "
        f"{content['sentences']:,} sentences that answer one. Percent: student / teacher. "
        f"{content['machine']}; commit {content['commit'][:8]}; `{content['command']}`."
    )
    return "\n".join([*lines, "", said])


DEPTHS = "depths"
"""The section of structure_latency.json that has students of several depths."""


def structures(path: Path, latency: Path) -> str:
    """What students of one size and several structures learnt of tasks, by structure_study.py, and
    how fast they are, by structure_latency.py."""
    if not path.is_file():
        return NONE
    content = json.loads(path.read_text())
    rows = content["rows"]
    timed = json.loads(latency.read_text()) if latency.is_file() else None
    times = _timed_rows(timed)
    places = list(dict.fromkeys((r["task"], kind) for r in rows for kind in ("dev", "outside")
                                if kind in r))  # fmt: skip
    titles = [task if kind == "dev" else f"{task}, outside" for task, kind in places]
    lines = [
        "| factor | structure | word table | MFLOPs per token | times as fast, fp32 | bf16 | "
        + " | ".join(titles)
        + " |",
        "|" + "---|" * (6 + len(places)),
    ]
    for factor, name in dict.fromkeys((row["factor"], row["structure"]) for row in rows):
        own = [row for row in rows if (row["factor"], row["structure"]) == (factor, name)]
        ranks = " + ".join(_ranks(part) for part in own[0]["table"].split(" + "))
        cells = [f"{factor:g}", name, ranks, f"{own[0]['flops_per_token'] / 1e6:.2f}"]
        cells += [_times(times, factor, dtype, name) for dtype in ("fp32", "bf16")]
        for task, kind in places:
            cells.append(_learnt([row for row in own if row["task"] == task], kind))
        lines.append("| " + " | ".join(cells) + " |")
    sets = (
        "Dev sets, and texts of another origin (sst2: IMDb, mrpc: PAWS). Word table: ranks of all "
        "rows and of the blocks."
    )
    return "\n".join([*lines, "", f"{_learnt_note(content, sets)} {_timed_note(timed)}"])


def depths(path: Path) -> str:
    """How fast students of one size and several depths are, by structure_latency.py."""
    timed = json.loads(path.read_text()) if path.is_file() else None
    if timed is None or DEPTHS not in timed["sections"]:
        return NONE
    rows = _timed_rows(timed, DEPTHS)
    factors = sorted({row["factor"] for row in rows})
    titles = [f"{factor:g}x, {dtype}" for factor in factors for dtype in ("fp32", "bf16")]
    lines = [f"| student | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for name in dict.fromkeys(name for row in rows for name in row["ratio"]):
        cells = [_times(rows, factor, t, name) for factor in factors for t in ("fp32", "bf16")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join([*lines, "", _timed_note(timed, DEPTHS)])


def _timed_rows(timed: dict[str, Any] | None, section: str = "students") -> list[dict[str, Any]]:
    """Those that were measured, small batches first."""
    rows = timed["sections"][section]["rows"].values() if timed else ()
    return sorted((row for row in rows if "error" not in row), key=lambda row: int(row["batch"]))


def _times(times: list[dict[str, Any]], factor: float, dtype: str, name: str) -> str:
    """How many times faster than the dense model, by batch size."""
    ratios = [row["ratio"] for row in times if (row["factor"], row["dtype"]) == (factor, dtype)]
    return " / ".join(f"{ratio[name]:.2f}x" for ratio in ratios if name in ratio) or NONE


def _timed_note(timed: dict[str, Any] | None, section: str = "students") -> str:
    if timed is None:
        return f"Times as fast: {NONE}."
    rows, machine = _timed_rows(timed, section), timed["sections"][section]["environment"]
    batches = " / ".join(str(batch) for batch in dict.fromkeys(row["batch"] for row in rows))
    commits = "; ".join(sorted({row["commit"] for row in rows}))
    return (
        f"Times as fast as the dense model, fused, at batch {batches} of 128 tokens: "
        f"{machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}; commits "
        f"{commits}; `{timed['command']}`."
    )


def _ranks(spec: str) -> str:
    """The number of terms: "15:30522x1*1x384" has 15, without the colon it is one."""
    if spec == "dense":
        return spec
    return spec.split(":")[0] if ":" in spec else "1"


def _learnt(rows: list[dict[str, Any]], kind: str) -> str:
    """Means over the seeds."""
    found = [(row[kind], row["metric"]) for row in rows if kind in row]
    if not found:
        return NONE
    score, off, hidden = (
        sum(values) / len(found)
        for values in zip(
            *(
                (one[metric], one.get("kl", one.get("rmse")), one["hidden"])
                for one, metric in found
            ),
            strict=True,
        )
    )
    return f"{100 * score:.1f}; {off:.3f}; {hidden:.3f}"


def _learnt_note(content: dict[str, Any], sets: str) -> str:
    """What `_learnt`'s numbers are, of which sets, and where they come from."""

    def each(key: str, separator: str = "; ") -> str:
        return separator.join(sorted({str(row[key]) for row in content["rows"]}))

    commits = "; ".join(sorted({row["commit"][:8] for row in content["rows"]}))
    return (
        "Score; mean KL of the student's answers from the teacher's, in nats; squared error of the "
        f"hidden states, summed over the layers. {sets} Seed {each('seed', ', ')}; "
        f"{each('machine')}; commits {commits}; `{content['command']}`."
    )


def starts(path: Path) -> str:
    """What students of one structure and several starts learnt of tasks, by start_study.py."""
    if not path.is_file():
        return NONE
    content = json.loads(path.read_text())
    rows = content["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        "| factor | start | " + " | ".join(f"{task}, start | end" for task in tasks) + " |",
        "|" + "---|" * (2 + 2 * len(tasks)),
    ]
    key = itemgetter("factor", "start", "task")
    for factor, name in dict.fromkeys(key(row)[:2] for row in rows):
        cells = [f"{factor:g}", name]
        for task in tasks:
            own = [row for row in rows if key(row) == (factor, name, task)]
            cells.append(_learnt([row["fitted"] | {"metric": row["metric"]} for row in own], "dev"))
            cells.append(_learnt(own, "dev"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _learnt_note(content, "Dev sets.")])


def tables(path: Path) -> str:
    """What word tables of one size lose on every text, fitted to its words or all rows alike."""
    if not path.is_file():
        return NONE
    content = json.loads(path.read_text())
    names = list(content["rows"][0]["lost"])
    lines = [
        "| factor | table | fitted to | numbers | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for row in content["rows"]:
        fit = "words as they occur" if row["fit"] == "words" else "all rows alike"
        cells = [f"{row['factor']:g}", row["table"], fit, f"{row['numbers'] / 1e6:.2f} M"]
        lines.append("| " + " | ".join([*cells, *(f"{row['lost'][n]:.2f}" for n in names)]) + " |")
    note = (
        "Lost part of the squared output over the words of the text (the first "
        f"{content['words'] / 1e6:g} M words of the text given, GLUE's training sets); "
        f"{content['machine']}; commit {content['commit'][:8]}; `{content['command']}`."
    )
    return "\n".join([*lines, "", note])
