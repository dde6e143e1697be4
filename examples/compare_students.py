"""Kronecker, truncated-SVD and dense two-layer students of one size, trained alike, on GLUE tasks.

    python examples/compare_students.py --model FOLDER --data-dir GLUE --tasks sst2 mrpc \\
        --factors 8 19 --output runs/compare --results examples/results/compare.json

The teacher is fine-tuned once per task. Every student of a row has the same number of parameters
(to within one rank), sees the same batches for the same number of steps, and is scored at the last
step, not at the best one. The dense student has two layers of the width that meets the count; its
hidden states have no counterpart in the teacher, so it learns from logits and labels alone.
An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    set_seed,
)

import kronbert
from kronbert.distill import Objective, Stage, Term, load_task, tokenize
from kronbert.distill.finetune import commonest_class, evaluate, labels_only, run_stage
from kronbert.job import open_teacher
from kronbert.search import svd_rank

# Epochs, learning rate and rows per batch of a task: (teacher, student).
SCHEDULE = {
    "sst2": ((2, 1e-4, 128), (1, 1e-3, 64)),
    "mrpc": ((4, 1e-4, 32), (5, 1e-3, 32)),
}
DEFAULT_SCHEDULE = ((3, 1e-4, 32), (5, 1e-3, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub name or folder of the base encoder")
    parser.add_argument("--data-dir", help="GLUE folders; without it the hub")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc"])
    parser.add_argument("--factors", nargs="+", type=float, default=[8.0, 19.0])
    parser.add_argument(
        "--students", nargs="*", default=["kronecker", "svd", "dense"], help="which, in this order"
    )
    parser.add_argument("--output", default="runs/compare")
    parser.add_argument("--results", help="JSON to write; default OUTPUT/results.json")
    parser.add_argument("--limit", type=int, help="training rows (a trial)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--no-latency", action="store_true", help="train only; time later, on a quiet machine"
    )
    options = parser.parse_args()

    out = Path(options.output)
    rows: list[dict[str, Any]] = []
    for task in options.tasks:
        data = load_task(task, data_dir=options.data_dir, limit=options.limit)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokens = tokenize(data, tokenizer)
        teacher_plan, student_plan = SCHEDULE.get(task, DEFAULT_SCHEDULE)
        folder = out / task
        row = trained(
            folder / "teacher",
            lambda f, d=data, t=tokens, s=teacher_plan, k=tokenizer: make_teacher(
                f, options, d, t, s, k
            ),
        )
        rows.append({"task": task, "student": "teacher", "factor": 1.0, **row})
        rows.append({"task": task, "student": "majority", "scores": commonest_class(tokens)})
        for factor in options.factors:
            for kind in options.students:
                row = trained(
                    folder / f"{kind}-{factor:g}",
                    lambda f, d=kind, x=factor, t=tokens, s=student_plan, k=tokenizer: make_student(
                        f, options, d, x, t, s, k
                    ),
                )
                rows.append({"task": task, "student": kind, "factor": factor, **row})
                print(json.dumps(rows[-1]["scores"]), kind, factor, flush=True)
    if options.no_latency:
        return
    for row in rows:
        add_latency(row, out / row["task"])
    target = Path(options.results) if options.results else out / "results.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**provenance(options), "rows": rows}, indent=1) + "\n")
    print(f"wrote {target}")


def trained(folder: Path, make: Any) -> dict[str, Any]:
    """The result of ``make(folder)``, from ``folder/result.json`` where it is done."""
    done = folder / "result.json"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        result = make(folder)
        scratch = done.with_suffix(".part")
        scratch.write_text(json.dumps(result, indent=1))
        os.replace(scratch, done)
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def make_teacher(folder: Path, options: Any, data: Any, tokens: Any, plan: Any, tokenizer: Any):
    set_seed(options.seed)
    teacher, _ = open_teacher(options.model, data.task)
    epochs, rate, batch = plan
    stage = Stage(
        name="teacher",
        objective=labels_only(),
        learning_rate=rate,
        epochs=epochs,
        batch_size=batch,
        seed=options.seed,
    )
    run_stage(teacher, None, stage, tokens, folder / "run", tokenizer=tokenizer)
    teacher.save_pretrained(folder / "model")
    return {
        "scores": evaluate(teacher, tokens, tokenizer),
        "parameters": teacher.num_parameters(),
        "stage": stage.to_dict(),
        "data": data.source,
        "commit": git("rev-parse", "HEAD"),
    }


def make_student(
    folder: Path, options: Any, kind: str, factor: float, tokens: Any, plan: Any, tokenizer: Any
) -> dict[str, Any]:
    set_seed(options.seed)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder.parent / "teacher/model")
    task_terms = (Term(tap="logits"), Term(tap="labels"))
    terms: tuple[Term, ...] = (
        Term(tap="embedding"),
        Term(tap="scores"),
        Term(tap="ffn"),
        *task_terms,
    )
    if kind == "dense":
        student, terms = two_layers(teacher, factor), task_terms
    else:
        plan_of = kronbert.plan(teacher, factor=factor, errors=False)
        if kind == "svd":
            plan_of = plan_of.edit(
                {
                    layer.size.name: svd_rank(layer.size.out, layer.size.inner, layer.weights)
                    for layer in plan_of.converted
                }
            )
        student = kronbert.convert(teacher, plan=plan_of)
    epochs, rate, batch = plan
    stage = Stage(
        name="task",
        objective=Objective(terms=terms),
        learning_rate=rate,
        epochs=epochs,
        batch_size=batch,
        seed=options.seed,
    )
    history = run_stage(student, teacher, stage, tokens, folder / "run", tokenizer=tokenizer)
    student.save_pretrained(folder / "model")
    return {
        "scores": evaluate(student, tokens, tokenizer),
        "parameters": student.num_parameters(),
        "stage": stage.to_dict(),
        "history": [entry for entry in history if "eval_loss" in entry],
        "shapes": shapes_of(student),
        "commit": git("rev-parse", "HEAD"),
    }


def shapes_of(student: Any) -> dict[str, str]:
    """Group and size of the converted layers -> their shapes."""
    plan = getattr(student, "kronecker_plan", None)
    return {
        f"{layer.size.group} {layer.size.out}x{layer.size.inner}": " + ".join(
            shape.spec for shape in layer.groups
        )
        for layer in (plan.converted if plan else ())
    }


def two_layers(teacher: Any, factor: float) -> Any:
    """A dense BERT of two layers, as wide as 1 / factor of the teacher's parameters allows.

    Of the widths within 3 % of the best fit, the one with the most heads (at most 12)."""
    budget = teacher.num_parameters() / factor
    base = teacher.config
    found = []
    for heads in (1, 2, 4, 6, 12):
        for width in range(heads, base.hidden_size, heads):
            changes = {
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_attention_heads": heads,
                "num_hidden_layers": 2,
            }
            config = BertConfig(**{**base.to_diff_dict(), **changes})
            size = parameters_of(config, base.num_labels)
            if size <= budget:
                found.append((size, heads, config))
    largest = max(size for size, _, _ in found)
    near = [one for one in found if one[0] >= 0.97 * largest]
    _, _, config = max(near, key=lambda one: (one[1], one[0]))
    return AutoModelForSequenceClassification.from_config(config)


def parameters_of(config: BertConfig, labels: int) -> int:
    h, f = config.hidden_size, config.intermediate_size
    tables = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) * h
    layer = 4 * (h * h + h) + 2 * h * f + f + h + 4 * h
    return tables + 2 * h + config.num_hidden_layers * layer + h * h + h + labels * (h + 1)


def add_latency(row: dict[str, Any], folder: Path) -> None:
    """Latency beside the teacher, alternating in one process: batch 1 and 8, sequence 128."""
    if row["student"] in ("teacher", "majority"):
        return
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher/model")
    name = f"{row['student']}-{row['factor']:g}"
    student = AutoModelForSequenceClassification.from_pretrained(folder / name / "model")
    measured = kronbert.report(student.eval(), teacher.eval()).to_json()
    row["latency"], row["environment"] = measured["latency"], measured["environment"]


def provenance(options: Any) -> dict[str, Any]:
    return {
        "command": "python examples/compare_students.py --model all-MiniLM-L6-v2 --data-dir GLUE "
        + " ".join(sys.argv[sys.argv.index("--tasks") :] if "--tasks" in sys.argv else []),
        "commit": git("rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kronbert": kronbert.__version__,
        },
        "seed": options.seed,
        "limit": options.limit,
    }


def git(*words: str) -> str:
    run = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
    return run.stdout.strip()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


if __name__ == "__main__":
    main()
