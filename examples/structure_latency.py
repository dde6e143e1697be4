"""How fast students of one size and several structures or depths run, each beside the dense model.

    python examples/structure_latency.py --out examples/results/structure_latency.json

MiniLM-L6 with random weights and two classes, its students by structure_study.py's plans, and of 6,
4 and 3 layers, fused; 128 tokens a row. Student and dense model take turns in one process; run
nothing else beside it. A run that was stopped goes on where it stopped. --quick: few cases, to see
that it works.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from study_structures import STRUCTURES, restructured  # type: ignore[import-not-found]
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import kronbert
from kronbert.bench_models import DTYPES, MINILM, SEED, cast
from kronbert.bench_results import Case, Results, timed_row
from kronbert.job_depth import base_of
from kronbert.latency import compare_models, random_inputs

SEQUENCE = 128

Students = Callable[[nn.Module, float, bool], dict[str, nn.Module]]
"""The dense model, a factor and whether to be quick -> students by name."""


def cases(made: Students, quick: bool) -> Iterator[Case]:
    """Every factor, dtype and batch size."""
    for factor in (8.0,) if quick else (8.0, 19.0):
        for dtype in ("fp32",) if quick else ("fp32", "bf16"):
            for batch in (1,) if quick else (1, 8):
                case = f"{factor:g}x batch {batch} sequence {SEQUENCE} {dtype}"
                yield case, partial(row, made, factor, dtype, batch, quick)


def row(made: Students, factor: float, dtype: str, batch: int, quick: bool) -> dict[str, Any]:
    """Each student beside the dense model alone: one that comes after another student finds less
    of the cache taken than one that comes after the dense model."""
    found = {name: cast(one, DTYPES[dtype]) for name, one in models(made, factor, quick).items()}
    given = random_inputs(found, SEQUENCE, batch, SEED)
    dense = found.pop("dense")
    ratio: dict[str, float] = {}
    times: dict[str, Any] = {}
    for name, student in found.items():
        pair = {"dense": dense, name: student}
        measured = compare_models(pair, given, batch, seconds=0.1 if quick else 4.0)
        timed = timed_row(measured, "dense")
        ratio |= timed["ratio"]
        times[name] = timed["ms"]
    about = {"factor": factor, "dtype": dtype, "batch": batch, "sequence": SEQUENCE}
    return about | {"ms": times, "ratio": ratio}


@cache
def models(made: Students, factor: float, quick: bool) -> dict[str, nn.Module]:
    """The dense model ("dense") and the students, fused, in float32."""
    torch.manual_seed(SEED)
    dense = BertForSequenceClassification(BertConfig(**MINILM)).eval()
    students = made(dense, factor, quick)
    return {"dense": dense} | {name: kronbert.fuse(one.eval()) for name, one in students.items()}


def by_structure(dense: nn.Module, factor: float, quick: bool) -> dict[str, nn.Module]:
    """By the names of their structures."""
    plan = kronbert.plan(dense, factor=factor, errors=False)
    names = ("planned", "balanced layers") if quick else STRUCTURES
    return {name: kronbert.convert(dense, plan=restructured(plan, name)) for name in names}


def by_depth(dense: nn.Module, factor: float, quick: bool) -> dict[str, nn.Module]:
    """Planned ones, by how many of the dense model's layers they have."""
    made = {}
    for layers in (6, 4) if quick else (6, 4, 3):
        base, wanted = base_of(dense, layers, {"factor": factor})
        made[f"{layers} layers"] = kronbert.convert(base, **wanted)
    return made


SECTIONS: dict[str, Students] = {"students": by_structure, "depths": by_depth}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON to write and to go on with")
    parser.add_argument("--quick", action="store_true", help="to see that it works")
    options = parser.parse_args()
    words = "--quick " if options.quick else ""
    results = Results(
        options.out,
        command=f"python examples/structure_latency.py {words}--out {options.out.name}",
        quick=options.quick,
    )
    for name, made in SECTIONS.items():
        results.section(name, cases(made, options.quick))


if __name__ == "__main__":
    main()
