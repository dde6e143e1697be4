"""GLUE's tasks: what each holds, what it refuses, and its metrics."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from transformers import EvalPrediction

from kronbert.distill.data import compute_metrics
from kronbert.distill.tasks import TASKS, Task, get_task
from kronbert.errors import DataError

# Tasks


def test_the_nine_tasks_keep_glue_s_label_order_and_metrics():
    assert list(TASKS) == "cola sst2 mrpc stsb qqp mnli qnli rte wnli".split()
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["rte"].labels == TASKS["qnli"].labels == ("entailment", "not_entailment")
    assert TASKS["wnli"].labels == ("not_entailment", "entailment")
    assert {name: task.primary for name, task in TASKS.items()} == {
        "cola": "matthews", "sst2": "accuracy", "mrpc": "f1", "stsb": "spearman", "qqp": "f1",
        "mnli": "accuracy", "qnli": "accuracy", "rte": "accuracy", "wnli": "accuracy",
    }  # fmt: skip
    assert TASKS["mnli"].splits == ("validation_matched", "validation_mismatched")
    assert [TASKS[n].num_labels for n in ("stsb", "sst2", "mnli")] == [1, 2, 3]
    assert get_task("SST-2") is TASKS["sst2"]


@pytest.mark.parametrize("name", TASKS)
def test_task_survives_json(name):
    assert Task.from_dict(json.loads(json.dumps(TASKS[name].to_dict()))) == TASKS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ()}, "expected one or two column names"),
        ({"text": ("label",)}, "both text and label"),
        ({"labels": ("a",)}, "expected two or more different names"),
        ({"metrics": ("acuracy",)}, "unknown metric 'acuracy'. Nearest: 'accuracy'"),
        ({"metrics": ("spearman",), "primary": "spearman"}, "does not measure classification"),
        ({"labels": None}, "'accuracy' does not measure regression"),
        ({"primary": "f1"}, "primary='f1' is not in metrics"),
        ({"splits": ()}, "at least one dev set"),
        ({"max_length": 2}, "expected tokens, 8 or more"),
        ({"lables": ("a", "b")}, "unknown key 'lables'. Nearest: 'labels'"),
    ],
)
def test_task_checks_itself(change, message):
    with pytest.raises(DataError, match=re.escape(message)):
        Task.from_dict(TASKS["sst2"].to_dict() | change)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("mnli", "neutral", 1), ("mnli", "2", 2), ("mnli", 2, 2), ("mnli", 1.0, 1),
        ("mnli", "3", None), ("mnli", -1, None), ("mnli", None, None), ("mnli", "", None),
        ("wnli", "entailment", 1), ("rte", "entailment", 0), ("sst2", " positive ", 1),
        ("stsb", "3.25", 3.25), ("stsb", 4, 4.0), ("stsb", "nan", None), ("stsb", "high", None),
    ],
)  # fmt: skip
def test_encode_takes_names_and_indices(name, value, code):
    assert TASKS[name].encode(value) == code


# Metrics


def test_classification_metrics_are_scikit_learn_s():
    rng = np.random.default_rng(0)
    logits, gold = rng.normal(size=(50, 2)), rng.integers(0, 2, 50)
    predicted = logits.argmax(1)
    batch = EvalPrediction(predictions=(logits, rng.normal(size=(3, 4))), label_ids=gold)
    assert compute_metrics(TASKS["mrpc"])(batch) == pytest.approx(
        {"f1": sk.f1_score(gold, predicted), "accuracy": (gold == predicted).mean()}
    )
    assert compute_metrics(TASKS["cola"])(batch) == pytest.approx(
        {"matthews": sk.matthews_corrcoef(gold, predicted)}
    )


def test_metrics_by_hand():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [5.0, 1.0]])  # 0 1 1 0
    gold = np.array([0, 1, 0, 1])  # 1 true positive, 1 false positive, 1 false negative
    batch = EvalPrediction(predictions=logits, label_ids=gold)
    assert compute_metrics(TASKS["qqp"])(batch) == {"f1": 0.5, "accuracy": 0.5}
    assert compute_metrics(TASKS["cola"])(batch) == {"matthews": 0.0}


def test_regression_metrics():
    gold = np.array([0.0, 1.0, 2.0, 5.0], dtype=np.float32)
    logits = np.array([[0.1], [0.4], [0.2], [9.0]], dtype=np.float32)
    scores = compute_metrics(TASKS["stsb"])(EvalPrediction(predictions=logits, label_ids=gold))
    assert scores["spearman"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(gold, logits[:, 0])[0], abs=1e-6)
    flat = EvalPrediction(predictions=np.ones((4, 1)), label_ids=gold)
    assert compute_metrics(TASKS["stsb"])(flat) == {"spearman": 0.0, "pearson": 0.0}


def test_a_diverged_model_has_no_score():
    batch = EvalPrediction(predictions=np.array([[np.nan, 1.0]]), label_ids=np.array([1]))
    assert math.isnan(compute_metrics(TASKS["sst2"])(batch)["accuracy"])
