"""The standard error of the share of the teacher's score that a student keeps."""

import numpy as np
import pytest
from transformers import EvalPrediction

from kronbert.distill.retention import DRAWS, retention_error, share_kept
from kronbert.distill.tasks import METRICS, get_task
from kronbert.errors import DistillError


def test_no_share_of_a_score_that_is_not_above_0():
    assert share_kept(0.6, 0.8) == pytest.approx(0.75)
    assert share_kept(-0.2, 0.8) == pytest.approx(-0.25)
    assert share_kept(0.59, -0.58) is None
    assert share_kept(0.1, 0.0) is None


def models(task, rows, seed, noise=0.5):
    """(student, teacher): the teacher is right more often than not, the student errs mostly where
    it does."""
    random = np.random.default_rng(seed)
    gold = random.integers(2, size=rows) if task.labels else random.normal(size=rows)
    signal = np.where(gold == 1, 1.0, -1.0) if task.labels else gold
    teacher = signal + random.normal(size=rows)
    student = teacher + noise * random.normal(size=rows)

    def logits(values):
        return np.stack([-values, values], 1) if task.labels else values[:, None]

    return [EvalPrediction(predictions=logits(one), label_ids=gold) for one in (student, teacher)]


def kept(task, student, teacher):
    def score(one):
        logits = one.predictions
        found = logits.argmax(1) if task.labels else logits[:, 0]
        return METRICS[task.primary](one.label_ids, found)

    return score(student) / score(teacher)


@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_is_the_spread_over_fresh_rows_of_the_same_kind(name):
    task = get_task(name)
    fresh = [kept(task, *models(task, 300, seed)) for seed in range(200)]
    told = [retention_error(task, *models(task, 300, seed)) for seed in range(2)]
    assert np.mean(told) == pytest.approx(np.std(fresh, ddof=1), rel=0.25)


def test_of_accuracy_by_the_formula():
    """The ratio of two means: its error is that of the mean of (s - ratio t) / mean(t)."""
    task = get_task("sst2")
    student, teacher = models(task, 2000, 7, noise=9.0)  # it keeps two thirds
    right = [one.predictions.argmax(1) == one.label_ids for one in (student, teacher)]
    own, theirs = (one.astype(float) for one in right)
    assert own.mean() < 0.7 * theirs.mean()
    changes = (own - own.mean() / theirs.mean() * theirs) / theirs.mean()
    wanted = changes.std() / np.sqrt(len(changes))
    found = retention_error(task, student, teacher)
    assert found == pytest.approx(wanted, rel=4 / np.sqrt(2 * DRAWS))


def test_the_same_answers_keep_all_of_it_on_any_rows():
    task = get_task("cola")
    _, teacher = models(task, 100, 0)
    assert retention_error(task, teacher, teacher) == 0.0
    assert retention_error(task, *models(task, 100, 0)) > 0.01


def test_one_seed_one_number():
    task = get_task("sst2")
    pair = models(task, 100, 0)
    assert retention_error(task, *pair) == retention_error(task, *pair)
    assert retention_error(task, *pair, seed=1) != retention_error(task, *pair)


def test_a_teacher_that_scores_nothing_has_no_share():
    task = get_task("cola")
    student, teacher = models(task, 100, 0)
    constant = EvalPrediction(
        predictions=np.tile([[1.0, 0.0]], (100, 1)), label_ids=teacher.label_ids
    )
    assert retention_error(task, student, constant) is None


def test_other_rows_are_refused():
    task = get_task("cola")
    (student, _), (_, teacher) = models(task, 100, 0), models(task, 100, 1)
    with pytest.raises(DistillError, match="same rows in the same order"):
        retention_error(task, student, teacher)
    fewer = EvalPrediction(predictions=teacher.predictions[:50], label_ids=teacher.label_ids[:50])
    with pytest.raises(DistillError, match=r"\(100,\) and \(50,\)"):
        retention_error(task, student, fewer)
