"""Losses on held-out text: the objective's own, measured without a trace on the training."""

import datasets
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
)

import kronbert
from kronbert.distill import DistillArguments, DistillTrainer
from kronbert.distill.held_out import curve_of, held_out_batches, sample_rows
from kronbert.distill.recipes.kroneckerbert import general_objective
from kronbert.errors import DataError, DistillError


@pytest.fixture
def rows():
    ids = torch.randint(5, 25, (21, 9)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 9] * 21})


def a_trainer(folder, tokenizer, dropout=0.0, mlm=True):
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    teacher = BertForMaskedLM(config)
    return DistillTrainer(
        kronbert.convert(teacher, rules={"re:.*(query|key|dense)": {"rank": 3}}),
        DistillArguments(output_dir=str(folder), use_cpu=True, report_to="none"),
        teacher=teacher,
        objective=general_objective(mlm=mlm),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=mlm),
    )


@pytest.mark.parametrize("mlm", [True, False])
def test_they_are_the_training_losses_without_dropout(mlm, rows, tokenizer, tmp_path):
    trainer = a_trainer(tmp_path, tokenizer, mlm=mlm)
    (batch,) = held_out_batches(rows, trainer.data_collator, 64)
    found = trainer.objective_losses([batch])
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
    assert found == pytest.approx({k: float(v) for k, v in trainer._term_sums.items()}, rel=1e-5)
    assert set(found) == {"embedding", "scores", "ffn"} | ({"mlm"} if mlm else set())
    assert min(value for name, value in found.items() if name != "embedding") > 0


def test_batches_count_by_their_rows(rows, tokenizer, tmp_path):
    trainer = a_trainer(tmp_path, tokenizer, mlm=False)
    (whole,) = held_out_batches(rows, trainer.data_collator, 64)
    parts = held_out_batches(rows, trainer.data_collator, 8)
    assert [len(part["input_ids"]) for part in parts] == [8, 8, 5]
    expected = trainer.objective_losses([whole])
    assert trainer.objective_losses(parts) == pytest.approx(expected, rel=1e-5)


def test_no_trace_is_left(rows, tokenizer, tmp_path):
    """With dropout: the measurement is in eval mode, and draws no random number."""
    trainer = a_trainer(tmp_path, tokenizer, dropout=0.5)
    trainer.model.train()
    before = torch.get_rng_state()
    batches = held_out_batches(rows, trainer.data_collator, 8)
    first = trainer.objective_losses(batches)
    assert trainer.objective_losses(batches) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.model.training
    assert not trainer._term_sums
    assert all(p.grad is None for p in trainer.model.parameters())
    torch.rand(1)  # another state of the generator: the words are masked as before
    again = held_out_batches(rows, trainer.data_collator, 8)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, again, strict=True))
    assert any((part["labels"] != -100).any() for part in batches)


def test_no_batch_and_no_rows(rows, tokenizer, tmp_path):
    with pytest.raises(DistillError, match="no batch"):
        a_trainer(tmp_path, tokenizer).objective_losses([])
    with pytest.raises(DataError, match=r"sample_rows\(limit=0\)"):
        sample_rows(rows, 0)


def test_sample_is_spread_over_the_rows(rows):
    assert sample_rows(rows, 30) is rows
    picked = sample_rows(rows, 4)["input_ids"]
    assert list(picked) == [rows[i]["input_ids"] for i in (0, 5, 10, 15)]


def test_curve_of_a_log():
    log = [
        {"step": 0, "held_out_ffn": 2.0, "held_out_seconds": 1.0, "epoch": 0.0},
        {"step": 1, "loss": 3.0, "loss_ffn": 2.5},
        {"step": 4, "held_out_ffn": 1.0, "held_out_seconds": 1.0},
    ]
    assert curve_of(log) == [{"step": 0, "loss_ffn": 2.0}, {"step": 4, "loss_ffn": 1.0}]
