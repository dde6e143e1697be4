"""Stages and recipes as data, and what becomes of them as training arguments."""

import json
from typing import Any

import numpy as np
import pytest

from kronbert.distill import Objective, Recipe, Stage, Term, recipes
from kronbert.distill.recipes.kronbert import kronbert
from kronbert.distill.recipes.kroneckerbert import kroneckerbert
from kronbert.errors import DistillError

OBJECTIVE = Objective(terms=(Term(tap="ffn"), Term(tap="logits", loss="kl", temperature=3.0)))


def anything(value: Any) -> Any:
    """For what type checkers know to be wrong."""
    return value


def a_stage(**changes):
    given = {"name": "task", "objective": OBJECTIVE, "learning_rate": 3e-4, "epochs": 2.5}
    return Stage(**given | changes)


def test_pieces_of_text_have_no_cached_teacher():
    with pytest.raises(DistillError, match="cache_teacher and pieces"):
        a_stage(pieces=(16, 32), cache_teacher=True)


def test_stage_survives_json():
    stage = a_stage(batch_size=48, scheduler="cosine", warmup_ratio=0.0)
    assert Stage.from_json(stage.to_json()) == stage


def test_numbers_of_numpy_are_numbers():
    term = Term(tap="ffn", weight=np.float32(0.5))
    stage = a_stage(
        objective=Objective(terms=(term,), layer_map=np.array([1, 2])),
        seed=np.int64(3),
        warmup_ratio=np.float32(0.25),
        pieces=np.array([32, 128]),
        muon_rate=np.float64(20),
    )
    again = Stage.from_json(stage.to_json())
    assert again == stage
    assert (again.seed, again.warmup_ratio, again.pieces) == (3, 0.25, (32, 128))
    assert again.objective.layer_map == (1, 2)


def test_to_arguments(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    stage = a_stage(batch_size=48, scheduler="cosine", warmup_ratio=0.25)
    args = stage.to_arguments(tmp_path, gradient_accumulation_steps=3, weight_decay=0.5)
    assert args.learning_rate == 3e-4
    assert args.num_train_epochs == 2.5
    assert args.lr_scheduler_type == "cosine"
    assert args.get_warmup_steps(200) == 50
    assert args.weight_decay == 0.5  # overrides win
    assert args.per_device_train_batch_size == 16
    assert args.logging_first_step


def test_arguments_have_every_number_of_the_stage(tmp_path):
    numbers = {"weight_decay": 0.03, "max_grad_norm": 0.5, "seed": 7, "dropout": 0.2, "ema": 0.9,
               "small_rate": 8.0, "embedding_rate": 0.5, "muon_rate": 20.0}  # fmt: skip
    args = a_stage(**numbers).to_arguments(tmp_path)
    assert {key: getattr(args, key) for key in numbers} == numbers


def test_batch_size_is_shared_among_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(DistillError, match=r"batch_size=32\) does not divide among 5 processes"):
        a_stage().to_arguments(tmp_path)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: a_stage(epochs=0), r"Stage\('task', epochs=0\): expected a number > 0"),
        (lambda: a_stage(epochs=float("inf")), "epochs=inf.: expected a number > 0"),
        (lambda: a_stage(learning_rate="1e-3"), "learning_rate='1e-3'"),
        (lambda: a_stage(max_grad_norm=0), "max_grad_norm=0.: expected a number > 0"),
        (lambda: a_stage(batch_size=1.5), "batch_size=1.5.: expected a whole number"),
        (lambda: a_stage(max_length=0), "max_length=0.: expected a whole number"),
        (lambda: a_stage(warmup_ratio=1), "warmup_ratio=1.: expected a share of the steps"),
        (lambda: a_stage(weight_decay=-1), "weight_decay=-1.: expected >= 0"),
        (lambda: a_stage(weight_decay=float("nan")), "weight_decay=nan.: expected >= 0"),
        (lambda: a_stage(name="a/b"), "expected a name that can be a folder"),
        (lambda: a_stage(name=""), "expected a name that can be a folder"),
        (lambda: Stage.from_dict({"lr": 1}), "unknown key 'lr'"),
        (lambda: Stage.from_dict({"name": "x"}), "needs objective, learning_rate, epochs, too"),
        (lambda: Stage.from_dict(anything(None)), "Stage: None: expected the dictionary"),
        (lambda: Stage.from_json("rate 1"), "Stage.from_json: no JSON"),
        (lambda: Recipe.from_dict({"stages": []}), "Recipe: needs name, paper, too"),
        (lambda: a_stage(weight_decay=float("inf")), "weight_decay=inf.: expected >= 0"),
        (lambda: a_stage(weight_decay="1"), "weight_decay='1'.: expected >= 0"),
        (lambda: a_stage(warmup_ratio=None), "warmup_ratio=None.: expected a share"),
        (lambda: a_stage(learning_rate=True), "learning_rate=True.: expected a number"),
        (lambda: a_stage(dropout="0.1"), "dropout='0.1': expected a probability"),
        (lambda: a_stage(ema=True), "ema=True: expected a share"),
        (lambda: a_stage(seed=None), "seed=None.: expected a whole number"),
        (lambda: a_stage(seed=-1), "seed=-1.: expected a whole number"),
        (lambda: a_stage(scheduler=3), "scheduler=3.: expected str"),
        (lambda: a_stage(cache_teacher=1), "cache_teacher=1.: expected bool"),
        (lambda: a_stage(pieces=16), "pieces=16.: expected lengths"),
        (lambda: a_stage(objective=None), "objective=None.: expected Objective"),
        (lambda: a_stage(name=1), "expected a name that can be a folder"),
        (lambda: Objective(terms=anything(None)), "terms=None.: expected Terms"),
        (lambda: Objective(terms=anything(("ffn",))), "expected Terms"),
        (lambda: Objective(terms=(), layer_map=anything(None)), "layer_map=None.: expected a name"),
        (lambda: Term(tap=anything(["ffn"])), "is not a tap"),
        (lambda: Term(tap="ffn", weight=True), "weight=True.: expected a finite number"),
        (lambda: recipes.get(anything(None)), "recipe None is not known"),
        (lambda: kronbert().stage(anything(3)), "has no stage 3"),
        (
            lambda: Recipe(name="a", paper="b", stages=(a_stage(),), tokens_wanted=anything("1")),
            "tokens_wanted='1'.: expected a whole",
        ),
        (lambda: a_stage().to_arguments("x", learning_rat=1), "learning_rat"),
        (lambda: a_stage(pieces=(8,)).to_arguments("x"), r"pieces=\(8,\).: .*run_stage"),
    ],
)
def test_what_a_stage_refuses(make, text):
    with pytest.raises(DistillError, match=text):
        make()


def test_kroneckerbert_is_the_papers():
    general, task = recipes.get("kroneckerbert-k21").stages
    assert [t.tap for t in general.objective.terms] == ["embedding", "scores", "ffn", "mlm"]
    assert [t.tap for t in task.objective.terms] == [
        "embedding",
        "scores",
        "ffn",
        "logits",
        "labels",
    ]
    assert {t.weight for s in (general, task) for t in s.objective.terms} == {1.0}
    assert (general.learning_rate, general.epochs, general.max_length) == (1e-3, 3, 512)
    assert (task.learning_rate, task.batch_size, task.max_length) == (5e-4, 32, 128)
    assert recipes.get("kroneckerbert-k8").stage("task").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("factor", "task", "rate"),
    [
        (4, None, 1e-4),
        (12, "sst2", 1e-4),
        (14, None, 5e-4),
        (30, "RTE", 5e-5),
        ("k8", "cola", 5e-5),
        ("K19", "qqp", 1e-4),
    ],
)
def test_kroneckerbert_rates(factor, task, rate):
    assert kroneckerbert(factor, task=task).stage("task").learning_rate == rate
    spelt = f"{task[:-1]}-{task[-1]}".upper() if task else None
    assert kroneckerbert(factor, task=spelt) == kroneckerbert(factor, task=task)


def test_kronbert_has_no_score_term_and_no_softmax_of_one_number():
    general, first, task = recipes.get("kronbert").stages
    assert [t.tap for t in general.objective.terms] == ["embedding", "ffn"]
    assert [t.tap for t in first.objective.terms] == ["embedding", "ffn"]
    assert [(t.tap, t.loss) for t in task.objective.terms[2:]] == [("logits", "kl")]
    assert first.learning_rate > task.learning_rate
    for made in (kronbert(task="STS-B"), kronbert(task="my scores", regression=True)):
        assert made.stage("task").objective.terms[2].loss == "mse"
    assert kronbert(mlm=True).stage("general").objective.label_tap == "mlm"
    large, small = (kronbert(task=name).stage("intermediate") for name in ("SST-2", "mrpc"))
    assert (large.epochs, large.batch_size) == (1, 64)
    assert (small.epochs, small.batch_size) == (1, 32)


def test_recipes_survive_json():
    for name in recipes.names():
        recipe = recipes.get(name)
        assert recipe.name == name
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    without = kroneckerbert(8, mlm=False).stages[0].objective
    assert without.label_tap is None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: recipes.get("kronekerbert-k8"), "not known. Nearest: 'kroneckerbert-k8'"),
        (lambda: recipes.get("kroneckerbert-k8").stage("tasks"), "no stage 'tasks'. Nearest: 'tas"),
        (lambda: kroneckerbert("k9"), "preset 'k9' is not known"),
        (lambda: kroneckerbert(1), "expected parameters before / after, > 1"),
        (lambda: kroneckerbert(float("nan")), "expected parameters before / after, > 1"),
        (lambda: Recipe(name="r", paper="p", stages=()), "expected stages with different names"),
    ],
)
def test_what_recipes_refuse(make, text):
    with pytest.raises(DistillError, match=text):
        make()
