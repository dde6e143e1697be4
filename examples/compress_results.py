"""Adds reports of `kronbert compress` to the JSON of the README's table.

python examples/compress_results.py out/report.json [more ...]

On the machine that made them, at its commit. A run takes the place of an earlier one of the same
machine, task, factor and seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from study_provenance import provenance  # type: ignore[import-not-found]

from kronbert.job_folder import write_whole
from kronbert.job_models import model_name

FOLDERS = ("model", "data_dir", "output", "student", "unlabelled", "stage1_text")
"""Settings that may name a folder of this machine: their last part is kept."""


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("reports", nargs="+", type=Path)
    made.add_argument("--results", default="examples/results/compress.json")
    made.add_argument("--commit", default="unknown", help="recorded outside of a git checkout")
    options = made.parse_args()
    results, here = Path(options.results), provenance(options.commit)
    before = json.loads(results.read_text())["runs"] if results.is_file() else []
    rows = {key_of(row): row for row in before}
    for path in options.reports:
        row = {**row_of(json.loads(path.read_text())), **here}
        rows[key_of(row)] = row
    content = {"command": "kronbert compress", "runs": list(rows.values())}
    write_whole(results, json.dumps(content, indent=1) + "\n")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs of the table apart."""
    asked = row["settings"]
    return (row["machine"], *(asked.get(name) for name in ("task", "factor", "preset", "seed")))


def row_of(report: dict[str, Any]) -> dict[str, Any]:
    """One run: what was asked, the scores, sizes, latencies and seconds of every step."""
    given = {key: value for key, value in report["settings"].items() if value is not None}
    settings = {k: Path(v).name if k in FOLDERS else v for k, v in given.items()}
    settings["model"] = model_name(report["settings"]["model"])
    kept = ("scores", "metric", "retention", "seconds", "data", "hidden_errors", "stages",
            "measured")  # fmt: skip
    start = report["start"]
    return {
        "settings": settings,
        "start": None if start is None else {**start, "name": Path(start["name"]).name},
        **{key: report[key] for key in kept},
        "history": {k: v for k, v in report["history"].items() if k in ("intermediate", "task")},
    }


if __name__ == "__main__":
    main()
