"""Pieces of general text: as many tokens, framed, drawn from the batch alone, refused elsewhere."""

import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from kronbert.distill import Objective, Stage, Term
from kronbert.distill.data import load_folder, tokenize
from kronbert.distill.finetune import run_stage
from kronbert.distill.held_out import held_out_batches
from kronbert.distill.pieces import BatchMasks, Pieces
from kronbert.distill.recipes.kronbert import general_stage
from kronbert.distill.text import load_text, pack_text
from kronbert.errors import DistillError

FFN = Objective(terms=(Term(tap="ffn"),))


@pytest.fixture
def blocks(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(["the soup was good and the room was dull and kind"] * 200))
    return pack_text(load_text(path), tokenizer, 32)


def batch(blocks, start):
    return [blocks[i] for i in range(start, start + 4)]


def test_pieces_hold_the_blocks_tokens_between_cls_and_sep(blocks, tokenizer):
    whole = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    cut = Pieces(whole, (8, 16, 32), tokenizer)
    seen = set()
    for start in range(0, len(blocks) - 4, 4):
        rows = batch(blocks, start)
        found = cut(rows)
        ids = found["input_ids"]
        seen.add(ids.shape[1])
        assert ids.numel() == 4 * 32
        assert found["attention_mask"].all()
        assert found["attention_mask"].shape == ids.shape
        assert (ids[:, 0] == tokenizer.cls_token_id).all()
        assert (ids[:, -1] == tokenizer.sep_token_id).all()
        before = torch.tensor([row["input_ids"] for row in rows]).reshape(ids.shape)
        assert torch.equal(ids[:, 1:-1], before[:, 1:-1])
        assert torch.equal(cut(rows)["input_ids"], ids)  # a resumed run draws the same
    assert seen == {8, 16, 32}


def test_masks_seed_no_gpu(blocks, tokenizer, monkeypatch):
    """Every step's dropout there would follow from its batch."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    rows = batch(blocks, 0)
    collator = BatchMasks(DataCollatorForLanguageModeling(tokenizer, mlm=True))
    assert torch.equal(collator(rows)["labels"], collator(rows)["labels"])
    held_out_batches(rows, collator.collator, 2)
    assert not seeded


def test_masked_words_are_drawn_in_the_pieces(blocks, tokenizer):
    torch.manual_seed(0)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.5)
    found = Pieces(collator, (8,), tokenizer)(batch(blocks, 0))
    assert found["labels"].shape == (16, 8)
    masked = found["labels"] != -100
    assert masked.any()
    assert not masked[:, [0, -1]].any()


def test_masks_follow_from_the_batch(blocks, tokenizer):
    """However often a batch is collated, and whatever was drawn before; nothing else is drawn."""
    masks = BatchMasks(DataCollatorForLanguageModeling(tokenizer, mlm=True))
    rows = [batch(blocks, start) for start in (0, 4, 8)]
    torch.manual_seed(1)
    first = [masks(one)["labels"] for one in rows]
    drawn = torch.rand(1)
    again = [masks(one)["labels"] for one in rows]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(masks(rows[0][::-1])["labels"].flip(0), first[0])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize("missing", ["cls_token", "sep_token"])
def test_a_tokenizer_without_frame_leaves_every_token(missing, tokenizer):
    setattr(tokenizer, missing, None)
    rows = [{"input_ids": list(range(5, 21))}, {"input_ids": list(range(6, 22))}]
    found = Pieces(lambda rows: rows, (8,), tokenizer)(rows)
    assert [token for row in found for token in row["input_ids"]] == [*range(5, 21), *range(6, 22)]


@pytest.mark.parametrize("pieces", [(5,), (2, 32), (64,), (8.0,)])
def test_lengths_that_do_not_divide_are_refused(pieces):
    with pytest.raises(DistillError, match=r"Stage\('x'\): pieces=.*divide max_length=32"):
        Stage(name="x", objective=FFN, learning_rate=1e-3, epochs=1, max_length=32, pieces=pieces)


def test_blocks_of_another_length_are_no_whole_pieces(tokenizer):
    with pytest.raises(DistillError, match="blocks of 4 tokens are not whole pieces of 8"):
        Pieces(list, (8,), tokenizer)([{"input_ids": [10, 11, 12, 13]}] * 2)


def test_task_rows_are_not_cut(tiny_bert, tiny_task, tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    stage = Stage(name="x", objective=FFN, learning_rate=1e-3, epochs=1, max_length=32, pieces=(8,))
    rows = tokenize(load_folder(tiny_task), tokenizer, 32)
    with pytest.raises(DistillError, match="task rows have lengths of their own"):
        run_stage(model, model, stage, rows, tmp_path / "run", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("length", "pieces"), [(128, (16, 32, 64, 128)), (40, (10, 20, 40)), (33, (33,)), (16, (8, 16))]
)
def test_the_recipe_halves_its_blocks(length, pieces):
    assert general_stage(max_length=length).pieces == pieces
