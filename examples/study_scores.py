"""What a model of the GLUE study scores, and how far a student answers as its teacher does."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

from study_data import Rows  # type: ignore[import-not-found]
from study_settings import is_subset  # type: ignore[import-not-found]

from kronbert.distill.data import TaskData, compute_metrics
from kronbert.distill.fidelity import fidelity
from kronbert.distill.finetune import answers, evaluate
from kronbert.distill.retention import retention_error
from kronbert.errors import DistillError
from kronbert.job_folder import write_whole
from kronbert.job_models import open_model


def scored(
    model: Any, rows: Rows, data: TaskData, tokenizer: Any, teacher: Any = None
) -> dict[str, Any]:
    """Dev scores, with ``teacher`` the fidelity on the same rows and the error of the share kept,
    and the scores out of distribution where the task has such a set. In float32."""
    metrics = compute_metrics(data.task)
    own = answers(model, data, tokenizer)
    found: dict[str, Any] = {"scores": {name: metrics(one) for name, one in own.items()}}
    if not all(isfinite(value) for one in found["scores"].values() for value in one.values()):
        raise DistillError("diverged: its logits are not finite. Try lower rates.")
    if teacher is not None:
        theirs = answers(teacher, data, tokenizer)
        found["fidelity"] = {
            name: fidelity(one.predictions, theirs[name].predictions) for name, one in own.items()
        }
        first = next(iter(own))
        found["retention_error"] = retention_error(data.task, own[first], theirs[first])
    outside = rows.outside(data.task)
    if outside is not None:
        found["outside"] = evaluate(model, outside, tokenizer)
        found["outside_data"] = outside.source
    return {
        **found,
        "metric": data.task.primary,
        "data": data.source,
        "subset": is_subset(data.source),
    }


def score_again(
    result: Path, rows: Rows, data: TaskData, tokenizer: Any, teacher: Path | None, commit: str
) -> dict[str, Any]:
    """``result``'s scores anew, from the model saved beside it; ``teacher``: the folder of a
    student's; commit: of the code that scores. The rest of the result stays as it is."""
    folder, content = result.parent / "model", json.loads(result.read_text())
    if not folder.is_dir():
        raise DistillError(f"{result}: no model beside it to score. Run it without --no-models.")
    other = None if teacher is None else open_model(str(teacher)).eval()
    found = scored(open_model(str(folder)).eval(), rows, data, tokenizer, other)
    changed = {**content, **found, "data": content["data"], "scored_at": commit}
    write_whole(result, json.dumps(changed, indent=1) + "\n")
    return changed
