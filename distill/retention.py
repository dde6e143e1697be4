"""How far the share that a student keeps of its teacher's score hangs on the rows it was scored on.

A dev set is a draw: other rows of the same kind would have given both models other scores. Seeds do
not show that, as all are scored on the same rows.
"""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction

from kronbert.distill.tasks import METRICS, Task, predicted
from kronbert.errors import DistillError

DRAWS = 400
"""The standard deviation of so many is itself off by 1 / sqrt(2 * 400) = 3.5 %."""


def share_kept(student: float, teacher: float) -> float | None:
    """The student's score as a fraction of its teacher's; None where that is not above 0."""
    return student / teacher if teacher > 0 else None


def retention_error(
    task: Task, student: EvalPrediction, teacher: EvalPrediction, *, seed: int = 0
) -> float | None:
    """Standard error of student's / teacher's primary score, a fraction; None where the teacher's
    is not above 0.

    Logits (rows, labels) and labels (rows) of both models on the same rows. By the bootstrap (Efron
    1979): rows drawn with replacement, as many as there are, the same for both models. The ratio's
    first-order change is drawn, (student - ratio * teacher) / teacher's score, so that a draw on
    which the teacher scores nothing does no harm. Raises `DistillError` for different rows."""
    gold = np.asarray(student.label_ids)
    if not np.array_equal(gold, teacher.label_ids):
        raise DistillError(
            f"retention_error: labels {gold.shape} and {np.shape(teacher.label_ids)} differ: "
            "expected the same rows in the same order."
        )
    score = METRICS[task.primary]
    own, theirs = predicted(task, student), predicted(task, teacher)
    whole = score(gold, theirs)
    if not whole > 0:
        return None
    ratio = score(gold, own) / whole
    random, changes = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        rows = random.integers(len(gold), size=len(gold))
        drawn = gold[rows]
        changes.append(score(drawn, own[rows]) - ratio * score(drawn, theirs[rows]))
    return float(np.std(changes, ddof=1) / whole)
