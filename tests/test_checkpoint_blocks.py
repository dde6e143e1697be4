"""Saved students whose word table has blocks of rows."""

import json

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

import kronbert
from kronbert import (
    CheckpointError,
    KroneckerLMHead,
    ShapeError,
)
from kronbert.reporting import weight_errors
from tests.small_berts import IDS, QUERY, SMALL, WORD, edit_config

BLOCKS = "4:384x1*1x48 + 6:60x1*1x48@9 + 2:100x4*1x12@284"


@pytest.mark.parametrize("init", ["weights", "data"])
def test_a_table_with_blocks_of_rows_and_its_head(init, tmp_path):
    teacher = BertForMaskedLM(BertConfig(**SMALL)).eval()
    given = {"init": init} | ({"calibration": [{"input_ids": IDS}]} if init == "data" else {})
    student = kronbert.convert(teacher, rules={WORD: BLOCKS, "re:.*query": {"rank": 3}}, **given)
    student.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert stored[WORD] == BLOCKS
    assert stored["cls.predictions.decoder"] == f"tied to {WORD}"
    expected = student(IDS).logits
    for loaded in (
        kronbert.load(tmp_path),
        AutoModelForMaskedLM.from_pretrained(tmp_path),
        BertForMaskedLM.from_pretrained(tmp_path),
    ):
        table = loaded.get_submodule(WORD)
        assert " + ".join(shape.spec for shape in table.groups) == BLOCKS
        assert (table.starts, table.padding_idx) == ((0, 9, 284), 0)
        assert isinstance(loaded.cls.predictions.decoder, KroneckerLMHead)
        assert torch.equal(loaded(IDS).logits, expected)
    plan = loaded.kronecker_plan
    assert plan.parameters == sum(p.numel() for p in loaded.parameters())
    assert kronbert.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    body = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert body.get_submodule(WORD).starts == (0, 9, 284)
    dense = kronbert.merge(loaded)
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    errors, unmatched = weight_errors(student, teacher)
    missed = dense.get_submodule(WORD).weight - teacher.get_submodule(WORD).weight
    whole = teacher.get_submodule(WORD).weight.norm()
    assert unmatched == ()
    assert errors[WORD] == pytest.approx((missed.norm() / whole).item(), rel=1e-5)
    if init == "weights":
        made = {layer.size.name: layer.error for layer in student.kronecker_plan.layers}
        assert errors[WORD] == pytest.approx(made[WORD], rel=1e-5)


def test_a_block_that_the_saved_sizes_do_not_hold(tmp_path):
    student = kronbert.convert(BertForMaskedLM(BertConfig(**SMALL)).eval(), rules={WORD: BLOCKS})
    student.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda data: data["layers"].update({WORD: BLOCKS.replace("@9", "@90")}))
    moved = kronbert.load(tmp_path)  # a block has its size: it may begin anywhere
    assert moved.get_submodule(WORD).starts == (0, 90, 284)
    edit_config(tmp_path, lambda data: data["layers"].update({WORD: BLOCKS.replace("@9", "@325")}))
    with pytest.raises(CheckpointError, match=r"makes rows 325 to 384 of 48 .* up to 383 of 48"):
        kronbert.load(tmp_path)


def test_blocks_that_cannot_be_converted():
    teacher = BertForMaskedLM(BertConfig(**SMALL)).eval()
    place = "bert.embeddings.position_embeddings"
    with pytest.raises(ShapeError, match=f"'{place}': .* needs b_out = 1"):
        kronbert.convert(teacher, rules={place: "4:144x1*1x48 + 30x4*2x12@9"})
    with pytest.raises(ShapeError, match=f"'{QUERY}': .*@9 starts at row 9: expected 0"):
        kronbert.convert(teacher, rules={QUERY: "4:48x1*1x48 + 30x1*1x48@9"})
