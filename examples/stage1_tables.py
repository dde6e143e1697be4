"""Tables of what comes before a task: word tables, stage 1; from their scripts' JSON."""

from __future__ import annotations

import json
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
