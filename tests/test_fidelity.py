"""How far a student answers as its teacher does."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr

from kronbert.distill.fidelity import fidelity
from kronbert.errors import DistillError


def logits(rows, labels, seed):
    return np.random.default_rng(seed).normal(size=(rows, labels)).astype(np.float32)


def test_a_model_is_faithful_to_itself():
    found = fidelity(logits(50, 3, 0), logits(50, 3, 0))
    assert found == {"agreement": 1.0, "kl": pytest.approx(0.0, abs=1e-12)}
    assert fidelity(logits(50, 1, 0), logits(50, 1, 0)) == {
        "correlation": pytest.approx(1.0),
        "rmse": 0.0,
    }


@pytest.mark.parametrize("labels", [2, 3])
def test_classes_by_the_definition(labels):
    student, teacher = logits(200, labels, 1), 30 * logits(200, labels, 2)
    found = fidelity(student, teacher)
    a, z = torch.from_numpy(student).double(), torch.from_numpy(teacher).double()
    a_log, z_log = a.log_softmax(-1), z.log_softmax(-1)
    wanted = F.kl_div(a_log, z_log, log_target=True, reduction="batchmean")
    assert found["kl"] == pytest.approx(float(wanted))
    same = (a.argmax(-1) == z.argmax(-1)).double().mean()
    assert found["agreement"] == pytest.approx(float(same))
    assert 0.2 < found["agreement"] < 0.7


def test_kl_takes_the_teacher_first():
    sure, unsure = np.array([[0.0, 5.0]]), np.array([[0.0, 0.0]])
    assert fidelity(unsure, sure)["kl"] == pytest.approx(math.log(2) - 0.0402, abs=1e-3)
    assert fidelity(sure, unsure)["kl"] == pytest.approx(1.8136, abs=1e-3)


def test_a_regression_by_the_definition():
    student, teacher = logits(200, 1, 1), logits(200, 1, 2)
    student += 0.5 * teacher
    found = fidelity(student, teacher)
    assert found["correlation"] == pytest.approx(pearsonr(student[:, 0], teacher[:, 0])[0])
    assert found["rmse"] == pytest.approx(float(np.sqrt(((student - teacher) ** 2).mean())))
    for pair in ((np.ones((5, 1)), logits(5, 1, 1)), (logits(5, 1, 1), np.ones((5, 1)))):
        assert fidelity(*pair)["correlation"] == 0.0


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (logits(4, 2, 0)[:3], "shapes"),
        (logits(4, 3, 0), "shapes"),
        (logits(4, 2, 0)[0], "shapes"),
        (np.full((4, 2), np.nan), "NaN"),
        (np.full((4, 2), np.inf), "NaN or infinity"),
    ],
)
def test_what_cannot_be_compared_is_refused(student, said):
    for pair in ((student, logits(4, 2, 1)), (logits(4, 2, 1), student)):
        with pytest.raises(DistillError, match=said):
            fidelity(*pair)


@pytest.mark.parametrize("given", [logits(4, 2, 0)[:, 0], logits(0, 2, 0)])
def test_what_holds_no_rows_of_logits_is_refused(given):
    with pytest.raises(DistillError, match="shapes"):
        fidelity(given, given)
