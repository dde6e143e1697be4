"""Learning rates that differ between matrices: who has which, also as the schedule goes on."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import kronbert
from kronbert.distill import DistillArguments, DistillTrainer, Objective, Stage, Term
from kronbert.distill.rates import rate_factors
from kronbert.errors import DistillError

LABELS = Objective(terms=(Term(tap="labels"),))
STAGE = Stage(name="task", objective=LABELS, learning_rate=1e-2, epochs=1, batch_size=4,
              warmup_ratio=0.25, small_rate=8.0, embedding_rate=0.5)  # fmt: skip


def names_of(model, factors):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[key].removeprefix("bert."): factor for key, factor in factors.items()}


def test_who_has_which_factor(mixed_student):
    layer = "encoder.layer.0"
    assert names_of(mixed_student, rate_factors(mixed_student, 8.0, 0.5)) == {
        "embeddings.word_embeddings.a": 0.5,
        "embeddings.word_embeddings.b": 4.0,
        "embeddings.position_embeddings.weight": 0.5,
        "embeddings.token_type_embeddings.weight": 0.5,
        f"{layer}.intermediate.dense.b": 8.0,
    }
    # not: the low-rank layer (64 : 16 entries per term), nor the two matrices of equal size
    low = mixed_student.get_submodule(f"bert.{layer}.output.dense")
    assert (low.a.numel(), low.b.numel()) == (2 * 16, 2 * 64)
    assert rate_factors(mixed_student) == {}


def test_a_matrix_is_small_from_a_quarter_of_the_other_on():
    model = kronbert.convert(
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 28)),
        rules={"0": "4x4*8x8", "1": "4x4*7x8"},
    )
    assert names_of(model, rate_factors(model, 8.0)) == {"0.a": 8.0}


def a_trainer(mixed_student, folder, stage=STAGE, **kwargs):
    args = stage.to_arguments(
        folder, max_steps=8, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": [3, 5 + i, 7], "attention_mask": [1] * 3, "labels": i % 2} for i in
            range(32)]  # fmt: skip
    return DistillTrainer(
        mixed_student, args, teacher=None, objective=LABELS, train_dataset=rows, **kwargs
    )


def groups_of(trainer):
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {names[id(p)]: g for g in trainer.optimizer.param_groups for p in g["params"]}


def test_groups_keep_decay_and_ratios_through_the_schedule(mixed_student, tmp_path):
    trainer = a_trainer(mixed_student, tmp_path)
    seen = []
    real = trainer.training_step

    def step(*args, **kwargs):
        groups = groups_of(trainer)
        seen.append({name: group["lr"] for name, group in groups.items()})
        return real(*args, **kwargs)

    trainer.training_step = step
    trainer.train()
    groups = groups_of(trainer)
    assert set(groups) == {name for name, _ in mixed_student.named_parameters()}
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(groups)
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    assert decayed == set(trainer.get_decay_parameter_names(mixed_student))
    factors = names_of(mixed_student, rate_factors(mixed_student, 8.0, 0.5))
    plain = [1e-2 * share for share in (0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    assert len(seen) == 8
    for rate, rates in zip(plain, seen, strict=True):
        for name, value in rates.items():
            factor = factors.get(name.removeprefix("bert."), 1.0)
            assert value == pytest.approx(rate * factor), name
    # what is logged is the plain rate
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx(plain)


def test_the_small_matrix_moves_further(mixed_student, tmp_path):
    """Adam's first steps are as long as the rate."""
    before = {name: p.detach().clone() for name, p in mixed_student.named_parameters()}
    trainer = a_trainer(mixed_student, tmp_path, replace(STAGE, weight_decay=0.0))
    trainer.train()
    moved = {
        n: float((p.detach() - before[n]).abs().mean()) for n, p in mixed_student.named_parameters()
    }
    dense = "bert.encoder.layer.0.intermediate.dense"
    ratio = moved[f"{dense}.b"] / moved[f"{dense}.a"]
    assert 3 < ratio < 12, ratio


def test_no_switch_changes_nothing(mixed_student, tmp_path):
    trainer = a_trainer(mixed_student, tmp_path, replace(STAGE, small_rate=1.0, embedding_rate=1.0))
    trainer.create_optimizer()
    assert len(trainer.optimizer.param_groups) == 2  # transformers' own: with decay and without
    assert {g["lr"] for g in trainer.optimizer.param_groups} == {1e-2}


def test_groups_are_split_once(mixed_student, tmp_path):
    trainer = a_trainer(mixed_student, tmp_path)
    for _ in range(2):
        trainer.create_optimizer()
    assert {g["lr"] for g in trainer.optimizer.param_groups} == {1e-2, 8e-2, 5e-3, 4e-2}


def test_frozen_tables_stay_out(mixed_student, tmp_path):
    mixed_student.bert.embeddings.requires_grad_(False)
    trainer = a_trainer(mixed_student, tmp_path)
    trainer.train()
    assert not [name for name in groups_of(trainer) if "embeddings" in name]


def test_a_given_optimizer_is_not_changed(mixed_student, tmp_path):
    given = torch.optim.SGD(mixed_student.parameters(), lr=1.0)
    trainer = a_trainer(mixed_student, tmp_path, optimizers=(given, None))
    with pytest.raises(DistillError, match="rates of a given optimizer are its own"):
        trainer.train()


@pytest.mark.parametrize("key", ["small_rate", "embedding_rate"])
@pytest.mark.parametrize("value", [0, -1, "2", float("inf")])
def test_what_is_no_rate(key, value, tmp_path):
    with pytest.raises(DistillError, match=rf"Stage\('task'\): {key}=.*expected a number > 0"):
        replace(STAGE, **{key: value})
    with pytest.raises(DistillError, match=f"DistillArguments: {key}="):
        DistillArguments(output_dir=str(tmp_path), **{key: value})


def test_a_dense_model_has_no_small_matrix():
    assert rate_factors(nn.Linear(4, 4), small_rate=8.0) == {}


def test_stage_survives_json():
    assert Stage.from_json(STAGE.to_json()) == STAGE
