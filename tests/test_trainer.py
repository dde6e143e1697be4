"""DistillTrainer: small models trained alone, resumed and accumulated."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import BertForMaskedLM, BertForMultipleChoice, BertForSequenceClassification

import kronbert.distill
from kronbert.distill import DistillTrainer, Objective, Stage, Term
from kronbert.distill.recipes.kroneckerbert import general_objective
from tests.small_trainer import (
    LABELS,
    LOGITS,
    TASK,
    a_dataset,
    a_model,
    a_trainer,
    arguments,
    collate,
    logged,
    masked,
    weights_of,
)


def test_every_term_is_logged_and_falls(tmp_path):
    teacher, rows = a_model(2).eval(), a_dataset(ragged=True)
    answers = teacher(**collate(rows)).logits.argmax(-1).tolist()
    rows = [row | {"labels": answer} for row, answer in zip(rows, answers, strict=True)]
    terms = [Term(tap=t.tap, weight=w) for t, w in zip(TASK.terms, (1, 2, 1, 3, 0.5), strict=True)]
    trainer = a_trainer(
        tmp_path,
        Objective(terms=tuple(terms)),
        teacher=teacher,
        train_dataset=rows,
        max_steps=40,
        lr_scheduler_type="constant",
    )
    trainer.train()
    history = logged(trainer)
    for row in history:
        total = sum(t.weight * row[f"loss_{t.tap}"] for t in terms)
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    for term in terms:
        values = [row[f"loss_{term.tap}"] for row in history]
        first, last = np.mean(values[:4]), np.mean(values[-4:])
        assert last < 0.95 * first, f"{term.tap}: {first} -> {last}"


def test_terms_are_averaged_between_logs(tmp_path):
    often, seldom = (a_trainer(tmp_path, logging_steps=n, max_steps=7) for n in (1, 3))
    for trainer in (often, seldom):
        trainer.train()
    each = [row["loss_ffn"] for row in logged(often)]
    means = [each[0], np.mean(each[1:3]), np.mean(each[3:6])]
    assert [row["loss_ffn"] for row in logged(seldom)] == pytest.approx(means, rel=1e-5)


def test_a_second_training_is_logged_by_itself(tmp_path):
    trainer = a_trainer(tmp_path, objective=LABELS, teacher=None, logging_steps=5, max_steps=8)
    for _ in range(2):
        trainer.train()
        for row in logged(trainer):
            assert row["loss_labels"] == pytest.approx(row["loss"], abs=2e-4)


def test_several_choices(tmp_path):
    """Each is a row of the encoder: hidden states (rows * choices, tokens, width)."""

    def choices(rows):
        batch = collate(rows)
        labels = batch.pop("labels")
        batch = {name: value.unflatten(0, (-1, 2)) for name, value in batch.items()}
        return batch | {"labels": labels[::2]}

    ragged = a_dataset(ragged=True)
    models = {
        "model": a_model(1, BertForMultipleChoice),
        "teacher": a_model(2, BertForMultipleChoice),
    }
    objective = Objective(
        terms=(Term(tap="ffn"), Term(tap="logits", loss="kl"), Term(tap="labels"))
    )
    trainer = a_trainer(
        tmp_path, objective, train_dataset=ragged, data_collator=choices, max_steps=30, **models
    )
    batch = choices(ragged[:8])
    found = trainer.objective_losses([batch])
    flat = {name: value.flatten(0, 1) for name, value in batch.items() if name != "labels"}
    bodies = [m.bert(**flat, output_hidden_states=True).hidden_states[1:] for m in models.values()]
    seen = flat["attention_mask"].bool()
    expected = sum((a - b)[seen].square().mean().item() for a, b in zip(*bodies, strict=True))
    assert found["ffn"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    assert logged(trainer)[-1]["loss_ffn"] < 0.8 * logged(trainer)[0]["loss_ffn"]


def test_the_teacher_is_left_alone(tmp_path):
    teacher = a_model(2).train()
    before = weights_of(teacher)
    trainer = a_trainer(tmp_path, teacher=teacher, save_strategy="steps", save_steps=12)
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(before[name], p) for name, p in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    mine = {id(p) for p in trainer.model.parameters()}
    assert trainer.optimizer is not None
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == mine
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12")
    torch.testing.assert_close(weights_of(saved), weights_of(trainer.model))


def test_a_perfect_student_has_no_loss(tmp_path):
    teacher = a_model(2)
    objective = Objective(terms=TASK.terms[:4])
    trainer = a_trainer(
        tmp_path,
        objective,
        model=copy.deepcopy(teacher),
        teacher=teacher,
        train_dataset=a_dataset(ragged=True),
        max_steps=1,
    )
    trainer.train()
    assert logged(trainer)[0]["loss"] < 1e-10  # rounding, no more
    batch = collate(a_dataset(4))
    loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert loss.requires_grad
    assert not outputs.logits.requires_grad


def test_resume_equals_an_uninterrupted_run(tmp_path):
    dropout = {"hidden_dropout_prob": 0.1}
    whole = a_trainer(tmp_path / "a", model=a_model(1, **dropout))
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 5}
    cut = a_trainer(tmp_path / "b", model=a_model(1, **dropout), **saving)
    cut.train()
    resumed = a_trainer(tmp_path / "b", model=a_model(9, **dropout), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    assert resumed.state.global_step == 12
    for name, weight in weights_of(whole.model).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    one, other = logged(whole)[-1], logged(resumed)[-1]
    assert {k: v for k, v in one.items() if "loss" in k} == {
        k: v for k, v in other.items() if "loss" in k
    }


def test_accumulated_batches_equal_one_batch(tmp_path):
    one = a_trainer(tmp_path, optim="sgd")
    two = a_trainer(
        tmp_path, optim="sgd", per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    for trainer in (one, two):
        trainer.train()
    torch.testing.assert_close(weights_of(two.model), weights_of(one.model), rtol=1e-4, atol=1e-6)
    for row, other in zip(logged(one), logged(two), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert other["loss_scores"] == pytest.approx(row["loss_scores"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)


def test_bf16(tmp_path: Path) -> None:
    student = a_model(1)
    trainer = a_trainer(
        tmp_path, model=student, bf16=True, max_steps=40, lr_scheduler_type="constant"
    )
    seen: list[torch.dtype] = []
    teacher = trainer.teacher
    assert teacher is not None
    query = teacher.get_submodule("bert.encoder.layer.0.attention.self.query")
    query.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}  # the teacher runs in the student's autocast
    rows = logged(trainer)
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert np.mean([r["loss"] for r in rows[-4:]]) < 0.9 * np.mean([r["loss"] for r in rows[:4]])


def test_evaluation_is_the_students_own(tmp_path):
    rows = a_dataset(16, ragged=True)
    trainer = a_trainer(
        tmp_path,
        eval_dataset=rows,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        per_device_eval_batch_size=16,
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        out = trainer.model.eval()(**collate(rows))
    assert metrics["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    labels = collate(rows)["labels"]
    expected = (out.logits.argmax(-1) == labels).float().mean()
    assert metrics["eval_accuracy"] == pytest.approx(expected.item())
    np.testing.assert_allclose(trainer.predict(rows).predictions, out.logits, rtol=1e-4, atol=1e-6)
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    assert trainer.predict(unlabelled).predictions.shape == (16, 2)


@pytest.mark.parametrize("mlm", [False, True])
def test_stage_one_trains_no_more_than_its_terms(tmp_path, mlm):
    student, teacher = a_model(1, BertForMaskedLM), a_model(2, BertForMaskedLM)
    before = weights_of(student)
    trainer = a_trainer(
        tmp_path,
        general_objective(mlm=mlm),
        model=student,
        teacher=teacher,
        data_collator=masked,
        max_steps=30,
        lr_scheduler_type="constant",
        weight_decay=0.1,
    )
    trainer.train()
    rows = logged(trainer)
    names = ["embedding", "scores", "ffn"] + (["mlm"] if mlm else [])
    for name in names:
        assert rows[-1][f"loss_{name}"] < 0.95 * rows[0][f"loss_{name}"], name
    head = "cls.predictions.transform.dense.weight"
    assert torch.equal(before[head], student.state_dict()[head]) != mlm


def test_labels_alone_need_no_teacher(tmp_path):
    plain = a_trainer(tmp_path, LABELS, teacher=None)
    plain.train()
    usual = transformers.Trainer(
        a_model(1), arguments(tmp_path), train_dataset=a_dataset(), data_collator=collate
    )
    usual.train()
    torch.testing.assert_close(weights_of(plain.model), weights_of(usual.model))
    assert a_trainer(tmp_path, LABELS, teacher=a_model(2)).teacher is None  # not even moved


def test_another_depth_with_a_layer_map(tmp_path):
    trainer = a_trainer(
        tmp_path, teacher=a_model(2, num_hidden_layers=6), layer_map="uniform", max_steps=2
    )
    assert trainer.layers == (3, 6)
    trainer.train()
    trainer = a_trainer(tmp_path, layer_map=(None, 1), max_steps=2)
    trainer.train()
    assert logged(trainer)[-1]["loss_scores"] > 0


def test_a_student_that_reads_less_than_its_teacher(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=40
    )
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(a_dataset())
    trainer = a_trainer(
        tmp_path,
        model=transformers.DistilBertForSequenceClassification(config),
        train_dataset=rows,
        eval_dataset=rows,
        max_steps=2,
    )
    seen: list[Any] = []
    teacher = trainer.teacher
    assert teacher is not None
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    trainer.train()
    assert seen == [["attention_mask", "input_ids", "token_type_ids"]] * 2
    assert trainer.evaluate()["eval_loss"] > 0


def test_batches_grouped_by_length(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(a_dataset(ragged=True))
    trainer = a_trainer(
        tmp_path, train_dataset=rows, train_sampling_strategy="group_by_length", max_steps=8
    )
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
    assert np.mean(widths) < 9.5  # at random nearly every batch of eight has a row of ten
    trainer.train()


def test_vision_and_questions(tmp_path):
    vit = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=6,
    )
    pixels = [{"pixel_values": torch.randn(3, 12, 12), "labels": i % 2} for i in range(16)]
    trainer = a_trainer(
        tmp_path,
        model=transformers.ViTForImageClassification(vit),
        teacher=transformers.ViTForImageClassification(vit),
        train_dataset=pixels,
        data_collator=transformers.default_data_collator,
        max_steps=2,
    )
    trainer.train()
    assert {"loss_scores", "loss_ffn", "loss_logits"} <= logged(trainer)[-1].keys()
    rows = [
        {k: v for k, v in row.items() if k != "labels"} | {"start_positions": 1, "end_positions": 2}
        for row in a_dataset()
    ]
    trainer = a_trainer(
        tmp_path,
        LOGITS,
        model=a_model(1, transformers.BertForQuestionAnswering),
        teacher=a_model(2, transformers.BertForQuestionAnswering),
        train_dataset=rows,
        data_collator=transformers.default_data_collator,
        max_steps=2,
    )
    trainer.train()
    assert logged(trainer)[-1]["loss_labels"] > 0


def test_public_names():
    assert all(hasattr(kronbert.distill, name) for name in kronbert.distill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Distiller'"):
        _ = kronbert.distill.Distiller


def test_stage_to_trainer(tmp_path):
    told = {"learning_rate": 1e-3, "epochs": 1, "batch_size": 16, "dropout": 0.25}
    stage = Stage(name="task", objective=TASK, **told)
    args = stage.to_arguments(tmp_path, use_cpu=True, report_to="none", save_strategy="no")
    student, seen = a_model(1), set()
    before = {m: m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)}
    for module in before:
        module.register_forward_hook(lambda m, *_: seen.add(m.p))
    assert set(before.values()) == {0.0}
    trainer = DistillTrainer(
        student,
        args,
        teacher=a_model(2),
        objective=stage.objective,
        train_dataset=a_dataset(),
        data_collator=collate,
    )
    assert trainer.train().global_step == 4
    assert seen == {0.25}
    assert {m: m.p for m in before} == before
