"""Which structure learns most from a task: short equal training of students of one size.

    python examples/structure_study.py --model FOLDER_OR_HUB --data-dir GLUE --teachers runs/study

Every student is fitted to the same training rows and then learns the same rows in the same order,
by the library's recipe cut short: the teacher's hidden states, its answers in the last fifth. How
far its hidden states and answers are from the teacher's is measured on dev rows, and on texts of
another origin where the task has them. --teachers: an --output of glue_study.py. Each student is a
folder below --output; several processes may work on different tasks (--tasks). --results keeps the
rows that it has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from time import monotonic
from typing import Any

import datasets
import study_settings as settings  # type: ignore[import-not-found]
import torch
from study_data import Rows  # type: ignore[import-not-found]
from study_provenance import provenance  # type: ignore[import-not-found]
from study_structures import STRUCTURES, restructured  # type: ignore[import-not-found]
from transformers import set_seed

import kronbert
from kronbert.distill.begun import claim
from kronbert.distill.data import TaskData, row_lengths
from kronbert.distill.digests import rows_digest
from kronbert.distill.fidelity import fidelity
from kronbert.distill.finetune import answers, evaluate, run_stage
from kronbert.distill.recipes.kronbert import task_stages
from kronbert.distill.teacher_cache import model_digest
from kronbert.distill.unlabelled import training_rows
from kronbert.job_begin import hidden_error, row_batches
from kronbert.job_folder import write_whole
from kronbert.job_models import open_model, open_tokenizer, quiet

MEASURED = 512
"""Rows on which hidden states are compared, of dev and of another origin."""


def parser(study: str, names: Iterable[str], about: str) -> argparse.ArgumentParser:
    """study: "structure", whose --structures are chosen from ``names``; or of another column.
    about: of which the first line is shown."""
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    add = made.add_argument
    add("--model", required=True, help="hub name or folder of the base encoder")
    add("--teachers", required=True, help="folder with TASK/teacher/model")
    add("--data-dir", help="GLUE folders; without it the hub")
    add("--ood-dir", help="imdb/test.tsv and paws_wiki/dev.tsv (or .gz, .xz): measured as well")
    add("--tasks", nargs="+", default=["sst2", "mrpc", "cola"])
    add("--factors", nargs="+", type=float, default=[8.0, 19.0])
    chosen = list(names)
    add(f"--{study}s", dest="names", nargs="+", default=chosen, choices=chosen, metavar="NAME")
    add("--seeds", nargs="+", type=int, default=[42])
    add("--tokens", type=int, default=250_000, help="of the rows, of which there are 1.5 passes")
    add("--fit", type=int, default=512, help="training rows to which a student is fitted")
    add("--output", default=f"runs/{study}s", help="one folder per student")
    add("--results", default=f"examples/results/{study}s.json")
    add("--threads", type=int, default=1)
    return made


def work(task: type[Task], names: Iterable[str]) -> None:
    """The study of ``task``, whose students are told apart by ``names``."""
    about = sys.modules[task.__module__].__doc__ or ""
    options = parser(task.study, names, about).parse_args()
    output, results = Path(options.output), Path(options.results)
    rows_of(results, options.tokens, task.study)
    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    options.limit, options.text, options.ood_limit = None, None, MEASURED
    with quiet():
        tokenizer = open_tokenizer(options.model)
        rows = Rows(options, tokenizer)
        for glue in options.tasks:
            one = task(options, glue, rows, tokenizer)
            for seed in options.seeds:
                for factor in options.factors:
                    for name in options.names:
                        found = one.made(output, factor, name, seed)
                        said = json.dumps(found["dev"])
                        print(f"{glue} {factor:g}x {name}, seed {seed}: {said}", flush=True)
    collect(output, results, options.tokens, task.study, names)


class Task:
    """A task's teacher and rows, and the students that learn them."""

    study = "structure"
    """Which study: the column that tells its students apart."""

    def __init__(self, options: Any, name: str, rows: Rows, tokenizer: Any) -> None:
        self.options, self.name, self.tokenizer = options, name, tokenizer
        self.teacher = open_model(str(Path(options.teachers, name, "teacher", "model")))
        tokens = rows.count(name)
        training = settings.training_of(name, {}, tokens)
        self.stages = task_stages(name, tokens=tokens)
        self.whole = rows.tokens(name, training)
        self.data = some_rows(self.whole, options.tokens)
        self.told = {
            **{"tokens": options.tokens, "fit": options.fit},
            "teacher": model_digest(self.teacher),
            "rows": rows_digest(training_rows(self.data, self.stages[-1])),
        }
        self.sets = {"dev": self.whole, "outside": rows.outside(self.whole.task)}

    def made(self, output: Path, factor: float, name: str, seed: int) -> dict[str, Any]:
        """The student's row: from its folder, or trained now."""
        words = "".join(c if c.isalnum() or c == "." else "-" for c in name)
        folder = output / self.name / f"{factor:g}-{words}-seed{seed}"
        path = folder / "row.json"
        claim(folder, self.told, begun=path.is_file())
        if not path.is_file():
            row = self._made(folder, output / self.name / "teacher", factor, name, seed)
            write_whole(path, json.dumps(row, indent=1) + "\n")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _made(
        self, folder: Path, cache: Path, factor: float, name: str, seed: int
    ) -> dict[str, Any]:
        set_seed(seed)
        teacher, began = self.teacher, monotonic()
        teacher.requires_grad_(True)  # training froze it, and a student copies that
        fit = row_batches(self.whole.train, self.options.fit, seed, self.tokenizer)
        plan = kronbert.plan(teacher, factor=factor, errors=False)
        student, passes = self.begin(plan, name, fit, seed)
        plan, fitted = student.kronecker_plan, self.measured(student)
        self.learn(student, folder, cache, seed, passes)
        return {
            "task": self.name,
            "factor": factor,
            self.study: name,
            "seed": seed,
            "parameters": plan.parameters,
            "flops_per_token": plan.linear_flops(1),
            "table": table_of(plan),
            "teacher": model_digest(teacher)[:16],
            "metric": self.whole.task.primary,
            "fitted": fitted,
            **self.measured(student),
            "seconds": round(monotonic() - began, 1),
            **provenance("unknown"),
        }

    def begin(self, plan: Any, name: str, fit: Any, seed: int) -> tuple[Any, float]:
        """The student as it is before it learns, and the passes left to it for hidden states.

        plan: the planner's; fit: batches of training rows."""
        plan = restructured(plan, name)
        return kronbert.convert(self.teacher, plan=plan, init="data", calibration=fit), 1.0

    def learn(self, student: Any, folder: Path, cache: Path, seed: int, passes: float) -> None:
        """The recipe cut short: ``passes`` for the hidden states, half of one for the answers."""
        whole = self.stages[0].epochs
        for stage, part in zip(self.stages, (passes, 1.0), strict=True):
            epochs = part * stage.epochs / whole
            short = replace(stage, epochs=epochs, seed=seed, cache_teacher=True)
            run_stage(
                student,
                self.teacher,
                short,
                self.data,
                folder / short.name,
                tokenizer=self.tokenizer,
                cache=cache,
                disable_tqdm=True,
                logging_strategy="no",
                eval_strategy="no",
            )

    def measured(self, student: Any) -> dict[str, Any]:
        """Of each set: the score, the fidelity, and how far the hidden states are off."""
        found = {}
        for name, data in self.sets.items():
            if data is None:
                continue
            dev = next(iter(data.validation))
            data = replace(data, validation={dev: data.validation[dev]})
            own, theirs = (answers(one, data, self.tokenizer)[dev].predictions
                           for one in (student, self.teacher))  # fmt: skip
            batches = row_batches(data.validation[dev], MEASURED, 0, self.tokenizer)
            found[name] = {
                **evaluate(student, data, self.tokenizer)[dev],
                **fidelity(own, theirs),
                "hidden": hidden_error(student, self.teacher, batches),
            }
        return found


def table_of(plan: Any) -> str:
    """The word table's groups."""
    tables = [layer.groups for layer in plan.converted if layer.size.kind == "embedding"]
    return " + ".join(shape.spec for shape in tables[0]) if tables else "dense"


def some_rows(data: TaskData, tokens: int) -> TaskData:
    """``data`` with as many of its rows, drawn once, as hold about so many tokens."""
    parts = [data.train, *([] if data.unlabelled is None else [data.unlabelled])]
    share = tokens / sum(sum(row_lengths(part)) for part in parts)
    kept = [
        part.shuffle(seed=0).select(range(max(1, min(len(part), round(share * len(part))))))
        for part in parts
    ]
    return replace(data, train=kept[0], unlabelled=kept[1] if len(kept) > 1 else None)


def collect(
    output: Path,
    results: Path,
    tokens: int,
    study: str = "structure",
    names: Iterable[str] = STRUCTURES,
) -> None:
    """Every student that is done, beside those of a JSON of earlier: folders do not last, rows do.

    study: which one, and the column that tells its students apart, by ``names``. A row takes the
    place of an earlier one of the same task, factor, seed and that column."""
    found = [json.loads(path.read_text()) for path in sorted(output.glob("*/*/row.json"))]
    earlier = rows_of(results, tokens, study)
    key = itemgetter("task", "factor", study, "seed")
    rows = list({key(row): row for row in (*earlier, *found)}.values())
    order = list(names)
    rows.sort(key=lambda row: (row["factor"], row["task"], order.index(row[study]), row["seed"]))
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    told = json.dumps(command(tokens, study))
    write_whole(results, f'{{\n "command": {told},\n "rows": [\n  {lines}\n ]\n}}\n')


def rows_of(results: Path, tokens: int, study: str = "structure") -> list[dict[str, Any]]:
    """Those of a JSON of earlier. SystemExit if its students learnt from more tokens, or fewer."""
    if not results.is_file():
        return []
    before = json.loads(results.read_text())
    if before["command"] != command(tokens, study):
        raise SystemExit(
            f"{results}: its rows are of {before['command']!r}. Students of other --tokens do not "
            "compare: give other --results."
        )
    found: list[dict[str, Any]] = before["rows"]
    return found


def command(tokens: int, study: str) -> str:
    """What the JSON records."""
    options = "--model MODEL --data-dir GLUE --teachers TEACHERS"
    return f"python examples/{study}_study.py {options} --tokens {tokens}"


if __name__ == "__main__":
    work(Task, STRUCTURES)
