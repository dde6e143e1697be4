"""The GLUE study: kronbert beside its peers of equal size, on every task, factor and seed.

    python examples/glue_study.py --data-dir GLUE --model FOLDER_OR_HUB --output runs/study
    python examples/glue_study.py --collect runs/study --results examples/results/glue_study.json

A teacher is fine-tuned once per task. Students of one task and factor have one size (to within one
rank), the same batches and steps, and the recipe's learning rates, which were chosen for kronbert's
(or, with --stage '{"rates": [...]}', each the best of one list); they are scored at the last step.
Each run is a folder with a result.json: what is done is skipped, what was killed goes on from its
checkpoint, and several processes may work on one --output. Tasks and schedules are in
study_settings.py; --stage overrides them for a variant that --tag names.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import study_results as results  # type: ignore[import-not-found]
import study_settings as settings  # type: ignore[import-not-found]
import torch
from study_folders import Busy, Run  # type: ignore[import-not-found]
from study_runs import Study  # type: ignore[import-not-found]

from kronbert.errors import KronbertError
from kronbert.job_models import quiet

PATIENCE = 20.0
"""Seconds between two looks at what another process has to finish first."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--model", help="hub name or folder of the base encoder")
    add("--data-dir", help="GLUE folders; without it the hub")
    add("--ood-dir", help="imdb/test.tsv and paws_wiki/dev.tsv (or .gz, .xz): scored as well")
    add("--snli-dir", help="SNLI's train.* and dev.*: MNLI's teacher learns from its rows as well")
    add("--ood-limit", type=int, default=2000, help="rows of each, evenly spaced")
    add("--output", default="runs/study", help="one folder per run")
    add("--tasks", nargs="+", default=[*settings.FULL, *settings.PARTIAL])
    add("--factors", nargs="+", type=float, default=list(settings.FACTORS))
    own = [kind for kind in settings.KINDS if kind not in settings.STAGE1]
    add("--students", nargs="*", default=own, choices=list(settings.KINDS))
    add("--seeds", nargs="+", type=int, default=list(settings.SEEDS))
    add("--stage1", help="folder with students 8/, 8-svd/, 19/ of general text, for kinds *-stage1")
    add("--text", help="text for rows without a label, see text_rows in study_settings.py")
    add("--stage", help='JSON (or its file) over the task\'s stage: \'{"epochs": 5, "ema": 0.99}\'')
    add("--tag", help="name of the variant that --stage makes")
    add("--limit", type=int, help="training rows (a trial)")
    add("--cache-teacher", action="store_true", help="teachers' hidden states on disk, once for "
        "all students of a task: 6 GB each for MiniLM")  # fmt: skip
    add("--threads", type=int, default=1, help="of this process, on the CPU")
    add("--only-missing", action="store_true", help="keep results of other settings as they are")
    add("--no-models", action="store_true", help="do not save the students")
    add("--commit", default="unknown", help="recorded outside of a git checkout")
    add("--score-again", action="store_true", help="score the saved models of finished runs anew")
    add("--list", action="store_true", help="what is done and what is missing")
    add("--collect", nargs="+", metavar="OUTPUT", help="gather the results of these folders, and "
        "of a JSON of earlier")  # fmt: skip
    add("--results", default="examples/results/glue_study.json", help="JSON that --collect writes")
    return made


def runs_of(options: Any) -> list[Run]:
    """Teachers first; the seeds outside, so that few runs leave an even picture."""
    tag = options.tag or settings.MAIN
    return [
        *(Run(task=task, kind="teacher") for task in options.tasks),
        *(
            Run(task=task, kind=kind, factor=factor, seed=seed, tag=tag)
            for seed in options.seeds
            for task in options.tasks
            for factor in options.factors
            for kind in options.students
        ),
    ]


def work(study: Study, runs: list[Run]) -> list[str]:
    """Make every run; those that wait for another process are tried again. Returns what failed: one
    student that diverges does not cost the night."""
    pending, failed = runs, []
    while pending:
        later = []
        for run in pending:
            try:
                before = study.done(run)
                result = study.make(run)
            except Busy as busy:
                if not busy.own:
                    later.append(run)
                print(f"{run}: {busy}", flush=True)
                continue
            except KronbertError as error:
                study.failed.add(run)
                failed.append(f"{run}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                continue
            said = "done before" if before else f"{result['seconds']} s"
            print(f"{run}: {json.dumps(result['scores'])}, {said}", flush=True)
        if len(later) == len(pending):
            time.sleep(PATIENCE)
        pending = later
    return failed


def listed(study: Study, runs: list[Run]) -> str:
    """One line per run, and how many are done."""
    found = {run: study.done(run) for run in runs}
    lines = [f"{'done   ' if done else 'missing'}  {run}" for run, done in found.items()]
    return "\n".join([*lines, f"{sum(found.values())} of {len(found)} done"])


def main() -> None:
    made = parser()
    options = made.parse_args()
    if options.collect:
        results.collect([Path(folder) for folder in options.collect], Path(options.results))
        print(f"wrote {options.results}")
        return
    if options.model is None:
        made.error("--model: expected the base encoder, a hub name or a folder.")
    if options.stage and options.tag in (None, settings.MAIN):
        made.error("--stage: give the variant a name with --tag.")
    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    try:
        with quiet():
            run(options)
    except KronbertError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run(options: Any) -> None:
    study, runs = Study(options), runs_of(options)
    if options.list:
        print(listed(study, runs))
    elif options.score_again:
        for one in filter(study.done, runs):
            try:
                print(f"{one}: {json.dumps(study.score_again(one)['scores'])}", flush=True)
            except Busy as busy:
                print(f"{one}: {busy}", flush=True)
    elif failed := work(study, runs):
        sys.exit("\n".join([f"{len(failed)} failed:", *failed]))


if __name__ == "__main__":
    main()
