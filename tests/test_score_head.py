"""Scores of a large mean under bfloat16 autocast: what one learns, sees and keeps of them."""

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, EvalPrediction

import kronbert
from kronbert.distill import DistillTrainer, Objective, Term
from kronbert.distill.score_head import exact_scores, output_layer
from kronbert.distill.score_scale import take_unit
from kronbert.distill.teacher_cache import with_teacher
from tests.small_trainer import a_dataset, a_model, arguments, collate

ANSWERS = Objective(terms=(Term(tap="logits", loss="mse"),))
MEAN = 2000.0  # where numbers of bfloat16 are 8 apart


@pytest.fixture
def teacher():
    model = a_model(1, num_labels=1).eval()
    take_unit(model, MEAN, 20.0)
    return model


def spread(prediction: EvalPrediction) -> dict[str, float]:
    return {"spread": float(np.std(prediction.predictions))}


def trained(teacher, folder, bf16):
    student = kronbert.convert(teacher, factor=2).requires_grad_(True)
    rows = [{**row, "labels": float(row["labels"])} for row in a_dataset()]
    trainer = DistillTrainer(
        student,
        arguments(folder, max_steps=30, learning_rate=3e-3, bf16=bf16, logging_steps=30),
        teacher=teacher,
        objective=ANSWERS,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        compute_metrics=spread,
    )
    batch = collate(rows)
    before = trainer.objective_losses([batch])["logits"]
    trainer.train()
    logged = [one["loss_logits"] for one in trainer.state.log_history if "loss_logits" in one]
    seen = trainer.evaluate()["eval_spread"]
    assert trainer.predict(rows).predictions.std() == pytest.approx(seen)
    assert not any(module._forward_hooks for module in student.modules())
    return before, logged, trainer.objective_losses([batch])["logits"], seen


def test_a_student_learns_them_as_in_float32(teacher, tmp_path):
    exact, rounded = (trained(teacher, tmp_path / str(bf16), bf16) for bf16 in (False, True))
    assert exact[2] < 0.5 * exact[0]
    assert rounded[0] == pytest.approx(exact[0], rel=0.1)
    assert rounded[1] == pytest.approx(exact[1], rel=0.2)
    assert rounded[2] == pytest.approx(exact[2], rel=0.2)
    assert rounded[3] == pytest.approx(exact[3], rel=0.1)


def test_they_are_kept_as_in_float32(teacher, tiny_bert, tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [3, 4, n]} for n in range(5, 30)])
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def kept(dtype):
        found, _ = with_teacher(rows, teacher, tmp_path, tokenizer=tokenizer, autocast=dtype)
        return torch.tensor(found["teacher_logits"][:])

    exact, rounded = kept(None), kept(torch.bfloat16)
    assert exact.std() > 0.3
    assert (rounded - exact).abs().max() < 0.2 * exact.std()


def test_the_layer_is_left_as_it_was(teacher):
    layer = output_layer(teacher)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with exact_scores(teacher, None, a_model(0, num_labels=2)):
            assert layer(x).dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16
    assert not layer._forward_hooks


def test_gradients_reach_all_of_the_head(teacher):
    x, layer = torch.randn(4, 16), output_layer(teacher)
    with exact_scores(teacher), torch.autocast("cpu", torch.bfloat16):
        scores = layer(x.bfloat16())
    assert scores.dtype == torch.float32
    scores.sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], x.bfloat16().float().sum(0))
    assert layer.bias.grad.item() == 4
