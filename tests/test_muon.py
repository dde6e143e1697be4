"""Muon's steps: what they are, who takes them, and that a stopped run goes on the same."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kronbert.distill import DistillArguments, DistillTrainer, Objective, Stage, Term
from kronbert.distill.muon import (
    COEFFICIENTS,
    ITERATIONS,
    MOMENTUM,
    RMS,
    Muon,
    directions,
    muon_parameters,
    orthogonal,
)
from kronbert.errors import DistillError

LABELS = Objective(terms=(Term(tap="labels"),))
STAGE = Stage(name="task", objective=LABELS, learning_rate=1e-2, epochs=1, batch_size=4,
              weight_decay=0.0, muon_rate=2.0)  # fmt: skip


def a_trainer(mixed_student, folder, stage=STAGE, steps=8, **kwargs):
    args = stage.to_arguments(
        folder, max_steps=steps, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy=kwargs.pop("save", "no"), save_steps=4, **kwargs.pop("arguments", {}),
    )  # fmt: skip
    rows = [{"input_ids": [3, 5 + i, 7], "attention_mask": [1] * 3, "labels": i % 2} for i in
            range(32)]  # fmt: skip
    return DistillTrainer(
        mixed_student, args, teacher=None, objective=LABELS, train_dataset=rows, **kwargs
    )


def direction(gradient):
    (found,) = directions([gradient])
    return found


def by_definition(matrices):
    """The iteration as Jordan et al. 2024 write it, in float64."""
    x = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def test_stacks_of_every_size_together_are_the_iteration():
    """Weak directions too: singular values over six powers of ten."""
    torch.manual_seed(0)
    shapes = ((1, 29, 384), (3, 24, 16), (1, 384, 29), (1, 16, 77), (2, 24, 24))
    stacks = [torch.randn(shape) for shape in shapes]
    u, s, v = torch.linalg.svd(torch.randn(1, 29, 60, dtype=torch.float64), full_matrices=False)
    fading = u @ torch.diag_embed(torch.logspace(0, -6, 29, dtype=torch.float64) * s[:, :1]) @ v
    stacks.append(fading.float())
    for got, given in zip(orthogonal(stacks), stacks, strict=True):
        expected = by_definition(given)
        assert got.shape == given.shape
        assert float((got - expected).norm() / expected.norm()) < 1e-3, tuple(given.shape)


@pytest.mark.parametrize("shape", [(1, 29, 384), (1, 384, 29), (3, 24, 16), (1, 8, 8)])
def test_all_singular_values_become_about_one(shape):
    torch.manual_seed(1)
    given = torch.randn(shape)
    (got,) = orthogonal([given])
    values = torch.linalg.svdvals(got)
    assert 0.6 < float(values.min())
    assert float(values.max()) < 1.3
    # the singular vectors stay: U'ᵀ U S Vᵀ V' is diagonal
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    inner = u.mT @ got @ v.mT
    off = inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))
    assert float(off.abs().max()) < 1e-3


def test_a_zero_gradient_moves_nothing():
    assert float(direction(torch.zeros(2, 4, 4)).abs().max()) == 0


def test_the_vectors_of_a_truncated_svd_are_one_matrix():
    """(rank, out, 1) and (rank, 1, in): the terms' steps are orthogonal to one another."""
    torch.manual_seed(2)
    for shape in ((5, 64, 1), (5, 1, 64)):
        step = direction(torch.randn(shape)).reshape(5, 64) / (RMS * 8)
        gram = step @ step.T
        assert float((gram - torch.diag(gram.diag())).abs().max()) < 0.35
        assert 0.4 < float(gram.diag().min())
        assert float(gram.diag().max()) < 1.5


def test_terms_of_balanced_sums_are_matrices_of_their_own():
    torch.manual_seed(3)
    given = torch.randn(3, 24, 16)
    alone = torch.cat([direction(one[None]) for one in given])
    assert torch.allclose(direction(given), alone, atol=1e-6)


def test_a_step_is_as_long_as_adamws():
    torch.manual_seed(4)
    for shape in ((29, 384, 1), (2, 24, 16), (1, 64, 512)):
        size = float(direction(torch.randn(shape)).square().mean().sqrt())
        assert 0.5 * RMS < size < 1.5 * RMS, shape


def test_two_steps_by_hand():
    torch.manual_seed(5)
    matrix, other = nn.Parameter(torch.randn(2, 6, 5)), nn.Parameter(torch.randn(7))
    twin = nn.Parameter(other.detach().clone())
    start = matrix.detach().clone()
    plain = {"params": [other], "lr": 0.1, "weight_decay": 0.01}
    moved = {"params": [matrix], "lr": 0.3, "weight_decay": 0.5, "muon": True}
    optimizer = Muon([plain, moved])
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.01)
    expected, momentum = start, torch.zeros_like(start)
    for _ in range(2):
        gradient, small = torch.randn_like(matrix), torch.randn_like(other)
        matrix.grad, other.grad, twin.grad = gradient.clone(), small.clone(), small.clone()
        optimizer.step()
        adamw.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
        expected = (1 - 0.3 * 0.5) * expected - 0.3 * direction(ahead)
    assert torch.allclose(matrix, expected, atol=1e-5)
    assert torch.equal(other, twin)


def test_who_takes_which_steps(mixed_student, tmp_path):
    names = {id(p): name for name, p in mixed_student.named_parameters()}
    chosen = {names[id(p)] for p in muon_parameters(mixed_student)}
    layer = "bert.encoder.layer.0"
    dense = ("attention.output.dense", "intermediate.dense", "output.dense")
    assert {f"{layer}.{name}.{letter}" for name in dense for letter in "ab"} <= chosen
    assert not [n for n in chosen if n.endswith("bias") or "embeddings" in n or "LayerNorm" in n]
    trainer = a_trainer(mixed_student, tmp_path, replace(STAGE, embedding_rate=0.5, small_rate=8.0))
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == len(names)
    rates = {names[id(p)]: (g["lr"], g["muon"]) for g in groups for p in g["params"]}
    assert {name for name, (_, muon) in rates.items() if muon} == chosen
    assert rates[f"{layer}.output.dense.a"] == (2e-2, True)
    assert rates[f"{layer}.intermediate.dense.b"] == (16e-2, True)  # the small matrix of a pair
    assert rates["bert.embeddings.word_embeddings.a"] == (5e-3, False)
    assert rates["classifier.weight"] == (1e-2, False)


def test_a_stopped_run_goes_on_the_same(mixed_student, tmp_path):
    start = {name: p.detach().clone() for name, p in mixed_student.state_dict().items()}
    a_trainer(mixed_student, tmp_path / "whole").train()
    whole = {name: p.detach().clone() for name, p in mixed_student.state_dict().items()}
    mixed_student.load_state_dict(start)
    a_trainer(mixed_student, tmp_path / "run", save="steps").train()
    mixed_student.load_state_dict(start)
    again = a_trainer(mixed_student, tmp_path / "run", save="steps")
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    moved = [
        name for name, p in mixed_student.state_dict().items() if not torch.equal(p, start[name])
    ]
    assert len(moved) > 10
    for name, value in mixed_student.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_frozen_layers_stay_out(mixed_student, tmp_path):
    mixed_student.bert.requires_grad_(False)
    assert muon_parameters(mixed_student) == []
    a_trainer(mixed_student, tmp_path).train()


def test_no_rate_no_muon(mixed_student, tmp_path):
    trainer = a_trainer(mixed_student, tmp_path, replace(STAGE, muon_rate=None))
    trainer.create_optimizer()
    assert type(trainer.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("value", [0, -1, "2", float("inf")])
def test_what_is_no_rate(value, tmp_path):
    with pytest.raises(DistillError, match=r"Stage\('task'\): muon_rate=.*expected a number > 0"):
        replace(STAGE, muon_rate=value)
    with pytest.raises(DistillError, match="DistillArguments: muon_rate="):
        DistillArguments(output_dir=str(tmp_path), muon_rate=value)


def test_what_muon_does_not_go_with(mixed_student, tmp_path):
    given = torch.optim.SGD(mixed_student.parameters(), lr=1.0)
    with pytest.raises(DistillError, match=r"muon_rate.*rates of a given optimizer are its own"):
        a_trainer(mixed_student, tmp_path, optimizers=(given, None)).train()
    with pytest.raises(DistillError, match="muon_rate with optim=sgd"):
        a_trainer(mixed_student, tmp_path, arguments={"optim": "sgd"})
    other = torch.optim.SGD, {"lr": 1.0}
    with pytest.raises(DistillError, match=r"what has no Muon has AdamW, not SGD"):
        a_trainer(mixed_student, tmp_path, optimizer_cls_and_kwargs=other).train()
    with pytest.raises(ValueError, match=r"expected stacks .* got \(3, 4\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 4))], "muon": True}])


def test_stage_survives_json():
    assert Stage.from_json(STAGE.to_json()) == STAGE


@pytest.mark.parametrize("kind", ["cosine_with_min_lr", "polynomial"])
def test_schedules_end_where_they_should(kind, mixed_student, tmp_path):
    key = "min_lr" if kind == "cosine_with_min_lr" else "lr_end"
    told = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": {key: 1e-3}, "warmup_steps": 0}
    trainer = a_trainer(mixed_student, tmp_path, arguments=told)
    trainer.train()
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-3)
    assert trainer.lr_scheduler.get_last_lr()[-1] == pytest.approx(2e-3)
