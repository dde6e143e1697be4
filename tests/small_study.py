"""The GLUE study on a tiny BERT: its training, and how a test makes its runs."""

import json

from kronbert.distill.recipes.kronbert import task_stages
from kronbert.errors import DistillError

LAST = {k: v for k, v in task_stages("sst2")[-1].to_dict().items() if k != "seed"}
SMALL = {"stages": [LAST], "epochs": 1, "batch_size": 16, "rates": [1e-3],
         "calibration_rows": 32, "splice": 0}  # fmt: skip


def made(modules, options):
    """The results of all runs, by kind."""
    study = modules.runs.Study(options)
    runs = modules.main.runs_of(options)
    failed = modules.main.work(study, runs)
    if failed:
        raise DistillError(failed[0])
    return {run.kind: json.loads((run.folder(study.output) / "result.json").read_text())
            for run in runs}  # fmt: skip
