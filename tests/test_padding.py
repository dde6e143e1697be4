"""Task batches of few lengths: padded a little further, to the same end."""

import copy
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import kronbert
from kronbert.distill import Objective, Stage, Term, padding
from kronbert.distill.data import load_folder, tokenize
from kronbert.distill.finetune import run_stage
from kronbert.distill.padding import FewLengths, few_lengths
from tests.conftest import TINY_WORDS

LONGEST = 33

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def long_rows(tokenizer, tmp_path_factory):
    """Rows of 4 to 33 tokens."""
    folder = tmp_path_factory.mktemp("long") / "moods"
    folder.mkdir()
    draw = random.Random(0)
    for name, count in (("train", 192), ("dev", 16)):
        texts = [" ".join(draw.choices(TINY_WORDS, k=2 + i % (LONGEST - 3))) for i in range(count)]
        lines = [f"{text}\t{draw.choice(['glad', 'cross'])}" for text in texts]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return tokenize(load_folder(folder), tokenizer)


@pytest.fixture
def pair(tiny_bert):
    """A teacher that can read no more than the longest row, and its student."""
    config = AutoConfig.from_pretrained(tiny_bert, max_position_embeddings=LONGEST)
    torch.manual_seed(2)
    teacher = AutoModelForSequenceClassification.from_config(config)
    return teacher, kronbert.convert(teacher, factor=2)


def test_eight_lengths_between_powers_of_two():
    for tokens in range(1, 5000):
        assert tokens <= few_lengths(tokens) <= tokens * 9 / 8
        assert few_lengths(few_lengths(tokens)) == few_lengths(tokens)
    for power in (16, 32, 64, 128, 512):
        assert len({few_lengths(tokens) for tokens in range(power + 1, 2 * power + 1)}) == 8
        assert few_lengths(power) == power


@pytest.mark.parametrize(
    ("lengths", "longest", "wide"),
    [([17, 4], 40, 18), ([9, 4], 40, 9), ([33, 4], 34, 34), ([33, 4], 33, 33), ([37], 33, 37)],
)
def test_a_batch_is_padded_to_one_of_them(lengths, longest, wide, tokenizer):
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "label": n} for n in lengths]
    batch = FewLengths(tokenizer, longest)(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), wide)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"] == tokenizer.pad_token_id).sum(1).tolist() == [
        wide - n for n in lengths
    ]
    assert batch["labels"].tolist() == lengths


@pytest.mark.parametrize("cached", [False, True])
def test_a_stage_ends_where_it_did(cached, pair, long_rows, tokenizer, tmp_path, monkeypatch):
    terms = (Term(tap="embedding"), Term(tap="ffn"), Term(tap="logits"))
    stage = Stage(name="task", objective=Objective(terms=terms), learning_rate=1e-3, epochs=1,
                  batch_size=8, dropout=0.0, cache_teacher=cached)  # fmt: skip

    def run(folder):
        """The student and the lengths of its batches."""
        teacher, student = pair[0], copy.deepcopy(pair[1])
        lengths = set()

        def note(module, args, given):
            lengths.add(given["input_ids"].shape[1])

        student.register_forward_pre_hook(note, with_kwargs=True)
        run_stage(student, teacher, stage, long_rows, folder, tokenizer=tokenizer, precision="fp32")
        return student.state_dict(), lengths

    allowed = {few_lengths(tokens) for tokens in range(1, LONGEST)} | {LONGEST}
    few, lengths = run(tmp_path / "few")
    assert LONGEST in lengths
    assert lengths <= allowed
    monkeypatch.setattr(padding, "few_lengths", lambda tokens: tokens)
    exact, lengths = run(tmp_path / "exact")
    assert lengths - allowed
    assert any(not torch.equal(few[name], weight) for name, weight in pair[1].state_dict().items())
    for name, weight in exact.items():
        torch.testing.assert_close(few[name], weight, rtol=0, atol=1e-4)  # of 1.2e-2 moved
