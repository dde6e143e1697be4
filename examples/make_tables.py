"""Writes the tables of README.md and docs, and docs/retention.png, from examples/results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME picks the function below.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stage1_tables  # type: ignore[import-not-found]
import study_picture  # type: ignore[import-not-found]
import study_tables as study  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "examples" / "results"
STEPS = ("start", "intermediate", "task")
"""Of a `kronbert compress` run: what comes after the teacher."""


def compress() -> str:
    """Runs of `kronbert compress`, from compress.json: scores, sizes, latency, wall time."""
    content = json.loads((RESULTS / "compress.json").read_text())
    lines = [
        "| machine | task | smaller | parameters | teacher | student | kept | latency, batch 1 / 8 "
        "| starts: off the teacher's hidden states | start and stage 2 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in content["runs"]:
        measured = run["measured"]
        ratios = " / ".join(f"{one['ratio']:.1f}x" for one in measured["latency"])
        shown = [
            ", ".join(
                f"{name} {100 * value:.1f}" for name, value in next(iter(of.values())).items()
            )
            for of in (run["scores"]["teacher"], run["scores"]["student"])
        ]
        cells = [
            run["machine"],
            run["settings"]["task"],
            f"{measured['factor']:.1f}x",
            f"{measured['student']['parameters'] / 1e6:.2f} M",
            *shown,
            f"{100 * run['retention']:.1f} %",
            ratios,
            ", ".join(f"{k} {error:.2f}" for k, error in (run["hidden_errors"] or {}).items()),
            f"{sum(run['seconds'].get(name, 0) for name in STEPS) / 60:.1f} min",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = ", ".join(sorted({str(run["settings"]["seed"]) for run in content["runs"]}))
    versions = [run["versions"] for run in content["runs"]]
    torches, libraries = (
        "; ".join(sorted({one[name] for one in versions})) for name in ("torch", "transformers")
    )
    commits = "; ".join(sorted({run["commit"][:8] for run in content["runs"]}))
    said = (
        f"Dev-set scores of the last step, seed {seeds}, from a fine-tuned teacher; the nearer "
        "start was taken; models in float32 as saved, at sequence 128; torch "
        f"{torches}, transformers {libraries}; commits {commits}; `{content['command']}`, "
        "[examples/results/compress.json](examples/results/compress.json)."
    )
    return "\n".join([*lines, "", said])


def scores_of(sets: dict[str, dict[str, float]]) -> str:
    """Metrics of the first dev set."""
    return ", ".join(
        f"{name} {100 * value:.1f}" for name, value in next(iter(sets.values())).items()
    )


def rewritten(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def of_study(table: Callable[[Any], str]) -> Callable[[], str]:
    return lambda: table(study.read(RESULTS / "glue_study.json"))


TABLES = {
    "compress": compress,
    "study": of_study(study.full_tasks),
    "study_kept": of_study(study.kept),
    "study_agreement": of_study(study.agreement),
    "study_subsets": of_study(study.subsets),
    "study_outside": of_study(study.outside),
    "study_ablation": of_study(study.ablations),
    "tables": lambda: stage1_tables.tables(RESULTS / "tables.json"),
    "depths": lambda: stage1_tables.depths(RESULTS / "structure_latency.json"),
    "structures": lambda: stage1_tables.structures(
        RESULTS / "structures.json", RESULTS / "structure_latency.json"
    ),
    "starts": lambda: stage1_tables.starts(RESULTS / "starts.json"),
    "sentences": lambda: stage1_tables.sentences(RESULTS / "sentences.json"),
    "stage1": lambda: stage1_tables.stage1(RESULTS / "stage1.json"),
}

PAGES = ("README.md", "docs/accuracy.md", "docs/recipe.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the pages")
    check = parser.parse_args().check
    for page in PAGES:
        path = ROOT / page
        before = path.read_text()
        after = rewritten(before)
        if check:
            if after != before:
                sys.exit(f"{page} differs from examples/results: run me.")
        else:
            path.write_text(after)
    if check:
        return
    study_picture.retention_picture(
        study.read(RESULTS / "glue_study.json"), ROOT / "docs/retention.png"
    )


if __name__ == "__main__":
    main()
