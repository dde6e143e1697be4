"""The search for a learning rate: short runs, one choice, resumed per rate."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kronbert.distill import Objective, Stage, Term, rate_search, search_rates
from kronbert.distill.finetune import CACHE, labels_only
from kronbert.distill.rate_search import RateResult, RateSearch
from kronbert.errors import DistillError

STAGE = Stage(name="task", objective=labels_only(), learning_rate=1e-3, epochs=8, batch_size=16)
RATES = (3e-3, 1e-5)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def student(tiny_bert):
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert)


@pytest.fixture
def runs(monkeypatch):
    """The stages that were trained."""
    seen = []
    real = rate_search.run_stage

    def counted(model, teacher, stage, *args, **kwargs):
        seen.append(stage)
        return real(model, teacher, stage, *args, **kwargs)

    monkeypatch.setattr(rate_search, "run_stage", counted)
    return seen


def test_the_better_rate_wins_and_nothing_is_changed(student, rows, tokenizer, tmp_path, runs):
    before = copy.deepcopy(student.state_dict())
    given = {"tokenizer": tokenizer, "precision": "fp32"}
    found = search_rates(student, None, STAGE, rows, tmp_path / "a", RATES, **given)
    assert [(s.learning_rate, s.epochs) for s in runs] == [(1e-5, 2.0), (3e-3, 2.0)]
    assert [r.learning_rate for r in found.results] == [1e-5, 3e-3]
    low, high = (r.score for r in found.results)
    assert high > low + 0.1
    assert found.learning_rate == 3e-3
    assert found.metric == "accuracy"
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert "0.003" in str(found).splitlines()[2]
    assert str(found).splitlines()[2].endswith("<- chosen")
    assert json.loads(json.dumps(found.to_dict())) == json.loads(json.dumps(found.to_dict()))
    # once more from the start: the same scores; on the same folder: nothing is trained
    again = search_rates(student, None, STAGE, rows, tmp_path / "b", RATES, **given)
    assert [r.score for r in again.results] == [low, high]
    runs.clear()
    assert search_rates(student, None, STAGE, rows, tmp_path / "a", RATES, **given) == found
    assert runs == []


def test_only_the_missing_rates_are_trained(student, rows, tokenizer, tmp_path, runs):
    given = {"tokenizer": tokenizer, "precision": "fp32", "share": 1 / 8, "max_steps": 2}
    search_rates(student, None, STAGE, rows, tmp_path, [1e-4], **given)
    assert [p.name for p in (tmp_path / "rate-0.0001").iterdir()] == ["result.json"]
    runs.clear()
    found = search_rates(student, None, STAGE, rows, tmp_path, [1e-3, 1e-4], **given)
    assert [s.learning_rate for s in runs] == [1e-3]
    assert [r.learning_rate for r in found.results] == [1e-4, 1e-3]


def test_results_of_another_search_are_refused(student, rows, tokenizer, tmp_path):
    given = {"tokenizer": tokenizer, "precision": "fp32", "max_steps": 1}
    search_rates(student, None, STAGE, rows, tmp_path, [1e-4], **given)
    other = replace(STAGE, weight_decay=0.5)
    with pytest.raises(DistillError, match=r"result of another search \(other stage\)"):
        search_rates(student, None, other, rows, tmp_path, [1e-4], **given)
    labels = [1 - label for label in rows.train["labels"]]
    train = rows.train.remove_columns("labels").add_column("labels", labels)
    with pytest.raises(DistillError, match=r"result of another search \(other data\)"):
        search_rates(student, None, STAGE, replace(rows, train=train), tmp_path, [1e-4], **given)
    for options in ({**given, "max_steps": 2}, {"tokenizer": tokenizer, "precision": "fp32"}):
        with pytest.raises(DistillError, match=r"result of another search \(other options\)"):
            search_rates(student, None, STAGE, rows, tmp_path, [1e-4], **options)
    ranked = replace(rows, task=replace(rows.task, metrics=("macro_f1",), primary="macro_f1"))
    with pytest.raises(DistillError, match=r"result of another search \(other metric\)"):
        search_rates(student, None, STAGE, ranked, tmp_path, [1e-4], **given)
    teacher = copy.deepcopy(student)
    with pytest.raises(DistillError, match=r"result of another search \(other teacher\)"):
        search_rates(student, teacher, STAGE, rows, tmp_path, [1e-4], **given)
    bf16 = {**given, "precision": "bf16"}
    with pytest.raises(DistillError, match=r"result of another search \(other precision\)"):
        search_rates(student, None, STAGE, rows, tmp_path, [1e-4], **bf16)
    with torch.no_grad():
        student.classifier.bias += 1
    with pytest.raises(DistillError, match=r"result of another search \(other student\)"):
        search_rates(student, None, STAGE, rows, tmp_path, [1e-4], **given)


def test_the_teacher_reads_the_rows_once_for_all_rates(student, rows, tokenizer, tmp_path, calls):
    answers = Objective(terms=(Term(tap="logits", loss="kl"),))
    stage, teacher = replace(STAGE, objective=answers, cache_teacher=True), copy.deepcopy(student)
    given = {"tokenizer": tokenizer, "precision": "fp32", "max_steps": 1}
    search_rates(student, teacher, stage, rows, tmp_path / "a", RATES, **given)
    assert sum(calls) == len(rows.train)
    assert (tmp_path / "a" / CACHE).is_dir()
    own = tmp_path / "own"
    search_rates(student, teacher, stage, rows, tmp_path / "b", RATES[:1], cache=own, **given)
    assert own.is_dir()
    assert not (tmp_path / "b" / CACHE).exists()


def test_the_score_is_the_mean_over_dev_sets(rows, monkeypatch):
    found = {"matched": {"accuracy": 0.5, "f1": 0.0}, "mismatched": {"accuracy": 0.9, "f1": 1.0}}
    monkeypatch.setattr(rate_search, "evaluate", lambda *_: found)
    assert rate_search._score(None, rows, None) == pytest.approx(0.7)


def result(rate, score):
    return RateResult(learning_rate=rate, score=score, seconds=1.0)


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.5, 0.7, 0.6), 2), ((0.7, 0.7, 0.6), 1), ((None, 0.1, 0.1), 2), ((-0.2, None, -0.1), 3)],
)
def test_the_choice(scores, best):
    assert rate_search._best([result(i, s) for i, s in enumerate(scores, start=1)]) == best


def test_all_diverged(monkeypatch, student, rows, tokenizer, tmp_path):
    monkeypatch.setattr(
        rate_search, "evaluate", lambda *_: {"validation": {"accuracy": float("nan")}}
    )
    with pytest.raises(DistillError, match=r"every rate diverged \(1e-05, 0.003\)"):
        search_rates(
            student, None, STAGE, rows, tmp_path, RATES, tokenizer=tokenizer, precision="fp32",
            max_steps=1,
        )  # fmt: skip
    table = RateSearch(metric="f1", results=(result(1.0, None),), learning_rate=2.0)
    assert "diverged" in str(table)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rates": ()}, "expected different rates"),
        ({"rates": (1e-3, 1e-3)}, "expected different rates"),
        ({"share": 0}, r"expected a share in \(0, 1\]"),
        ({"share": 1.5}, r"expected a share in \(0, 1\]"),
    ],
)
def test_what_the_search_refuses(change, text, student, rows, tokenizer, tmp_path):
    given = {"rates": RATES, "tokenizer": tokenizer} | change
    with pytest.raises(DistillError, match=text):
        search_rates(student, None, STAGE, rows, tmp_path, **given)


def test_a_checkpoint_of_another_search_is_not_gone_on_from(
    student, rows, tokenizer, tmp_path, monkeypatch
):
    given = {"tokenizer": tokenizer, "precision": "fp32", "max_steps": 1}
    monkeypatch.setattr(rate_search, "_score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search_rates(student, None, STAGE, rows, tmp_path, [1e-4], **given)
    monkeypatch.undo()
    other = replace(STAGE, weight_decay=0.5)
    with pytest.raises(DistillError, match=r"asked.json: .*another search \(other stage\)"):
        search_rates(student, None, other, rows, tmp_path, [1e-4], **given)
    said = []
    search_rates(student, None, STAGE, rows, tmp_path, [1e-4], say=said.append, **given)
    assert "resumed after step 1" in said
