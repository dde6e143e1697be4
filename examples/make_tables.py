"""Writes the tables of README.md and docs/accuracy.md, and docs/retention.png, from the JSON files
in examples/results.

--check only compares the tables.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME picks the function below.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stage1_tables  # type: ignore[import-not-found]
import study_tables as study  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "examples" / "results"
TITLES = {
    "teacher": "MiniLM-L6 (teacher)",
    "majority": "always the commonest class",
    "kronecker": "**kronbert**",
    "svd": "truncated SVD",
    "dense": "dense, 2 layers",
}


def compare() -> str:
    """Students of one size, from compare.json: score, retention, parameters, latency ratio."""
    content = json.loads((RESULTS / "compare.json").read_text())
    lines = [
        "| task | student | parameters | smaller | score | kept | latency, batch 1 / 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["task"] == task]
        teacher = rows[0]
        for row in rows:
            lines.append("| " + " | ".join(cells(row, teacher)) + " |")
    versions = content["versions"]
    lines += [
        "",
        f"Dev-set scores of the last step, seed {content['seed']}; latency: times as fast as the "
        f"teacher in float32 at sequence 128, {content['machine']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; "
        f"[examples/results/compare.json](examples/results/compare.json), made with "
        f"`{content['command']}`, students trained at {', '.join(trained_at(content))}, timed at "
        f"{content['commit'][:8]}.",
        "",
        *(f"- {note}" for note in content.get("notes", ())),
    ]
    return "\n".join(lines)


def trained_at(content: dict[str, Any]) -> list[str]:
    """The commits that trained the students, in the order of their rows."""
    rows = [row for row in content["rows"] if row["student"] not in ("teacher", "majority")]
    return list(dict.fromkeys(row["commit"][:8] for row in rows))


def cells(row: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    def main_score(of: dict[str, Any]) -> float:
        return next(iter(next(iter(of["scores"].values())).values()))

    shown = [
        f"{name} {100 * value:.1f}"
        for values in row["scores"].values()
        for name, value in values.items()
    ]
    kept = f"{100 * main_score(row) / main_score(teacher):.1f} %"
    if row["student"] == "majority":
        return [row["task"], TITLES["majority"], "", "", ", ".join(shown), kept, ""]
    ratio = " / ".join(f"{one['ratio']:.1f}x" for one in row.get("latency", [])) or "1.0x"
    return [
        row["task"],
        TITLES[row["student"]],
        f"{row['parameters'] / 1e6:.2f} M",
        f"{teacher['parameters'] / row['parameters']:.1f}x",
        ", ".join(shown),
        kept,
        ratio,
    ]


def rewritten(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def of_study(table: Callable[[Any], str]) -> Callable[[], str]:
    return lambda: table(study.read(RESULTS / "glue_study.json"))


TABLES = {
    "compare": compare,
    "study": of_study(study.full_tasks),
    "study_subsets": of_study(study.subsets),
    "study_outside": of_study(study.outside),
    "study_ablation": of_study(study.ablations),
    "tables": lambda: stage1_tables.tables(RESULTS / "tables.json"),
    "stage1": lambda: stage1_tables.stage1(RESULTS / "stage1.json"),
}

PAGES = ("README.md", "docs/accuracy.md")


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        before = path.read_text()
        after = rewritten(before)
        if "--check" in sys.argv:
            if after != before:
                sys.exit(f"{page} differs from examples/results: run me.")
        else:
            path.write_text(after)
    if "--check" in sys.argv:
        return
    study.retention_picture(study.read(RESULTS / "glue_study.json"), ROOT / "docs/retention.png")


if __name__ == "__main__":
    main()
