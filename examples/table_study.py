"""What a smaller word table loses on real text: one rank for all rows, blocks of rows, 1 x n.

    python examples/table_study.py --model FOLDER_OR_HUB --text wiki.txt --data-dir GLUE

No training: tables are fitted to how often each row occurs in the text, and measured on it and on
GLUE's training sets. Lost: E||e - ê||² / E||e||² over the words as they occur.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from study_provenance import provenance  # type: ignore[import-not-found]
from study_settings import FULL  # type: ignore[import-not-found]
from study_structures import restructured  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

import kronbert
from kronbert.distill import load_task
from kronbert.distill.text import load_text
from kronbert.job_folder import write_whole
from kronbert.reference import kron_weight
from kronbert.shapes import Groups
from kronbert.weighted_fit import nearest_blocks, nearest_rows

AT_ONCE = 1000
SMOOTHING = 0.1
"""Added to every row's count, as `kronbert.convert(init="data")` does."""

TABLES = {"planned": "blocks of rows", "one-rank table": "one rank", "1 x n table": "1 x n"}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", required=True, help="hub name or folder of the encoder")
    made.add_argument("--text", required=True, help="as kronbert pretrain-student takes it")
    made.add_argument("--data-dir", help="GLUE folders; without it the hub")
    made.add_argument("--factors", nargs="+", type=float, default=[4.0, 8.0, 19.0, 30.0])
    made.add_argument("--words", type=int, default=1_000_000)
    made.add_argument("--results", default="examples/results/tables.json")
    options = made.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model)
    table = model.get_input_embeddings().weight.detach().double()
    text = load_text(options.text, limit_tokens=options.words)["text"]
    counts = {"text": counted(text, tokenizer, len(table))}
    for task in FULL:
        data = load_task(task, data_dir=options.data_dir)
        lines = (line for name in data.task.text for line in data.train[name])
        counts[task] = counted(lines, tokenizer, len(table))
    config = AutoConfig.from_pretrained(options.model)
    rows: list[dict[str, Any]] = []
    for factor in options.factors:
        plan = kronbert.plan(config, factor=factor)
        for structure, title in TABLES.items():
            changed = restructured(plan, structure)
            layer = next(x for x in changed.converted if x.size.kind == "embedding")
            for fit in ("words", "weights"):
                found = fitted(table, counts["text"], layer.groups, fit)
                rows.append(
                    {
                        "factor": factor,
                        "table": title,
                        "fit": fit,
                        "groups": " + ".join(shape.spec for shape in layer.groups),
                        "numbers": layer.weights,
                        "lost": {name: lost(table, found, c) for name, c in counts.items()},
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    content = {
        "command": "python examples/table_study.py --model MODEL --text TEXT --data-dir GLUE",
        "words": options.words,
        **provenance("unknown"),
        "rows": rows,
    }
    write_whole(Path(options.results), json.dumps(content, indent=1) + "\n")


def counted(lines: Iterable[str], tokenizer: Any, entries: int) -> Tensor:
    """How often each row occurs."""
    total = torch.zeros(entries, dtype=torch.float64)
    batch: list[str] = []
    for line in (*lines, None):
        if line is not None:
            batch.append(line)
        if batch and (line is None or len(batch) == AT_ONCE):
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            flat = torch.tensor([one for row in ids for one in row])
            total += torch.bincount(flat, minlength=entries)
            batch = []
    return total


def fitted(table: Tensor, count: Tensor, groups: Groups, fit: str) -> Tensor:
    """The table that the groups make, fitted to the words as they occur or to all rows alike."""
    if fit == "words":
        pairs = nearest_rows(table, count + SMOOTHING, groups)
    else:
        pairs, _ = nearest_blocks(table, groups)
    made = torch.zeros_like(table)
    for (a, b), shape in zip(pairs, groups, strict=True):
        made[shape.start : shape.start + shape.out_features] += kron_weight(a, b)
    return made


def lost(table: Tensor, made: Tensor, count: Tensor) -> float:
    whole = (count @ table.square().sum(1)).item()
    return round((count @ (table - made).square().sum(1)).item() / whole, 4)


if __name__ == "__main__":
    main()
