"""Rows by replacing words: which words, by which, how many, and what trains on them."""

import random
from dataclasses import replace

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import MaskedLMOutput

import kronbert
from kronbert.distill import augment, load_task, word_candidates
from kronbert.distill.data import TaskData
from kronbert.distill.tasks import Task
from kronbert.distill.word_candidates import Neighbours, Vocabulary
from kronbert.errors import DataError

PAIR = Task(name="pairs", text=("first", "second"), labels=("no", "yes"))
ONE = Task(name="ones", text=("text",), labels=("no", "yes"))


@pytest.fixture(scope="module")
def table(tokenizer):
    """A circle on which good, fine, bright stand close, and bad, poor, dull opposite."""
    torch.manual_seed(0)
    rows = torch.randn(len(tokenizer), 6)
    vocabulary = tokenizer.get_vocab()
    for words, sign in ((("good", "fine", "bright"), 1.0), (("bad", "poor", "dull"), -1.0)):
        for i, word in enumerate(words):
            rows[vocabulary[word]] = torch.tensor([sign * 30.0, i, 0, 0, 0, 0])
    return rows


def data_of(task, rows):
    columns = {name: [row[i] for row in rows] for i, name in enumerate(task.text)}
    train = datasets.Dataset.from_dict(columns | {"label": [0] * len(rows)})
    return TaskData(task=task, train=train, validation={"validation": train}, source="toy")


def sentences(count, words=7, seed=0):
    draw = random.Random(seed)
    known = ["good", "bad", "soup", "room", "film", "kind", "rude"]
    return [(" ".join(draw.choices(known, k=words)),) for _ in range(count)]


# The vocabulary and the neighbours


def test_whole_words_only(tokenizer):
    words = set(Vocabulary(tokenizer).words.values())
    assert {"good", "soup", "film"} <= words
    assert not words & {"##s", "s", ".", "a", "[MASK]", "mask"}


def test_neighbours_are_the_nearest_others(tokenizer, table):
    near = Neighbours(Vocabulary(tokenizer), table, 2)
    found = near.find(["good", "dull", "zebra", "goods"])
    assert found["good"] == ["fine", "bright"]
    assert found["dull"] == ["poor", "bad"]
    assert found["zebra"] == []  # unknown pieces
    # brute force for all words that the vocabulary has
    vocabulary = Vocabulary(tokenizer)
    ids = list(vocabulary.words)
    cosine = nn.functional.cosine_similarity(
        table[ids].double()[:, None], table[ids].double()[None], dim=-1
    )
    cosine.fill_diagonal_(-2)
    for i, best in enumerate(cosine.topk(2).indices.tolist()):
        expected = [vocabulary.words[ids[j]] for j in best]
        assert near.find([vocabulary.words[ids[i]]]) == {vocabulary.words[ids[i]]: expected}


def test_several_pieces_are_their_mean(tokenizer, table):
    pieces = tokenizer("goods", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(pieces) == ["good", "##s"]
    tilted = table.clone()
    tilted[pieces[1]] = torch.tensor([-1.0, 0, 0, 0, 0, 1])  # unit(good) + this: off the circle
    tilted[tokenizer.get_vocab()["soup"]] = torch.tensor([0, 0, 0, 0, 0, 1.0])
    assert Neighbours(Vocabulary(tokenizer), tilted, 1).find(["goods"])["goods"] == ["soup"]


def test_a_row_of_zeros_is_nobody_s_neighbour(tokenizer, table):
    table = table.clone()
    table[tokenizer.get_vocab()["soup"]] = 0
    near = Neighbours(Vocabulary(tokenizer), table, 2)
    assert near.find(["good", "dull"]) == {"good": ["fine", "bright"], "dull": ["poor", "bad"]}


def cased():
    """A tokenizer whose words differ in case."""
    words = ["[PAD]", "[UNK]", "[MASK]", "good", "Good", "GOOD", "fine", "kind", "warm"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


def test_the_word_in_another_case_is_none_of_its_neighbours():
    tokenizer = cased()
    table = torch.tensor([[0.0, 1]] * 3 + [[5.0, 0], [5, 0.1], [1, 9], [5, 1], [5, 2], [5, 3]])
    near = Neighbours(Vocabulary(tokenizer), table, 2)
    assert near.find(["good", "Good"]) == {"good": ["fine", "kind"], "Good": ["fine", "kind"]}


def test_words_are_found_in_chunks(tokenizer, table, monkeypatch):
    words = ["good", "dull", "zebra", "soup", "room", "goods", "film"]
    whole = Neighbours(Vocabulary(tokenizer), table, 2).find(words)
    monkeypatch.setattr(word_candidates, "WORDS_AT_ONCE", 2)
    assert Neighbours(Vocabulary(tokenizer), table, 2).find(words) == whole


# Rows


def test_the_share_of_words_and_of_candidates(tokenizer, table):
    """p of the words change, and every candidate is equally likely."""
    task = data_of(ONE, [("good good good good good",)] * 200)
    rows = augment(task, tokenizer, table, copies=3, p=0.3, candidates=2, seed=1)
    words = [w for text in rows["text"] for w in text.split()]
    kept, total = words.count("good"), 200 * 3 * 5
    changed = total - kept - 5 * (600 - len(rows))  # rows without a change, or equal, are left out
    assert set(words) == {"good", "fine", "bright"}
    assert 0.25 < (len(words) - kept) / total < 0.35
    assert changed > 0
    fine = words.count("fine") / (words.count("fine") + words.count("bright"))
    assert 0.42 < fine < 0.58


def test_copies_differ_and_have_no_label(tokenizer, table):
    given = data_of(ONE, sentences(20))
    rows = augment(given, tokenizer, table, copies=6, seed=2)
    assert rows.column_names == ["text"]
    assert len(set(rows["text"])) == len(rows)
    assert not set(rows["text"]) & set(given.train["text"])
    assert 100 < len(rows) <= 120
    one = augment(data_of(ONE, [("good",)]), tokenizer, table, copies=20, candidates=2, seed=0)
    assert sorted(one["text"]) == ["bright", "fine"]  # there are no more


def test_the_seed_decides_and_neighbouring_rows_do_not(tokenizer, table):
    many, few = data_of(ONE, sentences(1500)), data_of(ONE, sentences(1500)[:40])
    first = augment(many, tokenizer, table, copies=2, seed=3)
    assert augment(many, tokenizer, table, copies=2, seed=3)["text"] == first["text"]
    assert augment(many, tokenizer, table, copies=2, seed=4)["text"] != first["text"]
    less = augment(few, tokenizer, table, copies=2, seed=3)["text"]
    assert list(less) == list(first["text"])[: len(less)]


def test_equal_rows_change_differently_however_far_apart(tokenizer, table):
    """1,000 rows are read at once: the draws of the next thousand are others."""
    given = data_of(ONE, [("good " * 16,)] * 1001)
    rows = augment(given, tokenizer, table, copies=1, p=1.0, candidates=2, seed=0)
    assert len(rows) == 1001
    assert len({rows[i]["text"] for i in (0, 1, 1000)}) == 3


def test_both_texts_of_a_pair_change_on_their_own(tokenizer, table):
    """The texts are equal: changed together, they would stay so. Nor does the first keep its
    change while the second is worked on."""
    given = data_of(PAIR, [("good bad good bad", "good bad good bad")] * 100)
    rows = augment(given, tokenizer, table, copies=2, p=0.5, candidates=2, seed=0)
    original = "good bad good bad".split()
    changes = [[[w != o for w, o in zip(row[name].split(), original, strict=True)]
                for name in PAIR.text] for row in rows]  # fmt: skip
    first, second = ([c for row in changes for c in row[side]] for side in (0, 1))
    together = sum(a and b for a, b in zip(first, second, strict=True)) / len(first)
    assert 0.4 < sum(first) / len(first) < 0.6
    assert 0.4 < sum(second) / len(second) < 0.6
    assert 0.18 < together < 0.32
    assert any(any(a) and not any(b) for a, b in changes)


def test_what_is_left_alone(tokenizer, table):
    text = "The good's film2 was not 100 % good_bad, e-good; Bad!"
    given = data_of(ONE, [(text,)])
    rows = augment(given, tokenizer, table, copies=30, p=1.0, candidates=2, seed=0)
    for row in rows["text"]:
        start, end = "The good's film2 was not 100 % good_bad, e-", "!"
        assert row.startswith(start)
        assert row.endswith(end)
        hyphened, last = row[len(start) : -len(end)].split("; ")
        assert hyphened in ("fine", "bright")
        assert last in ("Poor", "Dull")  # a capital stays one
    assert len(rows) == 4
    free = augment(given, tokenizer, table, copies=30, p=1.0, seed=0, stop_words=())
    assert any(not row.startswith("The") for row in free["text"])


def test_a_model_gives_its_table(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=64)  # fmt: skip
    model = BertModel(config)
    given = data_of(ONE, sentences(10))
    rows = augment(given, tokenizer, model, copies=2, seed=1)
    table = model.embeddings.word_embeddings.weight
    assert rows["text"] == augment(given, tokenizer, table, copies=2, seed=1)["text"]


def test_a_converted_model_gives_its_table():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64)  # fmt: skip
    from kronbert.distill.augmentation import _table_of

    model = kronbert.convert(BertModel(config), rules={"re:.*word_embeddings": {"rank": 32}})
    assert isinstance(model.embeddings.word_embeddings, kronbert.KroneckerEmbedding)
    assert _table_of(model).shape == (300, 32)


class _Reader(BertForMaskedLM):
    """Predicts, where the mask is, words by the word that stands before it."""

    def forward(self, input_ids, attention_mask, **kwargs):
        assert not self.training
        after = {"good": ("soup", "room"), "bad": ("stale", "fresh")}
        vocabulary = self.vocabulary
        logits = torch.zeros(*input_ids.shape, len(vocabulary))
        names = {index: word for word, index in vocabulary.items()}
        for row, ids in enumerate(input_ids.tolist()):
            assert ids.count(vocabulary["[MASK]"]) == 1
            at = ids.index(vocabulary["[MASK]"])
            first, second = after.get(names[ids[at - 1]], ("kind", "rude"))
            logits[row, at, vocabulary["##s"]] = 9  # the likeliest, but no whole word
            logits[row, at, vocabulary[first]], logits[row, at, vocabulary[second]] = 5, 4
        return MaskedLMOutput(logits=logits)


@pytest.fixture
def reader(tokenizer):
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=6, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=4)  # fmt: skip
    model = _Reader(config)
    model.vocabulary = tokenizer.get_vocab()
    _Reader.__name__ = "BertForMaskedLM"
    return model.train()


def test_a_masked_lm_reads_the_sentence(reader, tokenizer, table):
    with torch.no_grad():
        reader.bert.embeddings.word_embeddings.weight.copy_(table)
    given = data_of(ONE, [("the good film bad film goods",), ("good warm " * 30,)])
    rows = augment(given, tokenizer, reader, copies=40, p=0.5, candidates=2, seed=0)
    seen = [set() for _ in range(6)]
    for text in rows["text"][:40]:
        if len(words := text.split()) == 6:
            for place, word in enumerate(words):
                seen[place].add(word)
    assert seen[:5] == [
        {"the"},
        {"good", "kind", "rude"},
        {"film", "soup", "room"},
        {"bad", "kind", "rude"},
        {"film", "stale", "fresh"},
    ]
    assert len(seen[5] - {"goods"}) == 2  # two pieces: by the table
    assert reader.training


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"copies": 0}, "expected 1 copy or more"),
        ({"p": 0}, r"a chance in \(0, 1\]"),
        ({"candidates": 0}, "1 candidate or more"),
    ],
)
def test_what_augment_refuses(change, text, tokenizer, table):
    with pytest.raises(DataError, match=text):
        augment(data_of(ONE, sentences(2)), tokenizer, table, **{"copies": 1} | change)


def test_what_does_not_go_together(tokenizer, table, reader):
    given = data_of(ONE, sentences(2))
    with pytest.raises(DataError, match="one row per piece"):
        augment(given, tokenizer, table[:9], copies=1)
    with pytest.raises(DataError, match="Linear has no table of word embeddings"):
        augment(given, tokenizer, nn.Linear(2, 2), copies=1)
    tokenised = replace(given, train=given.train.rename_column("text", "input_ids"))
    with pytest.raises(DataError, match="the rows are tokenised"):
        augment(tokenised, tokenizer, table, copies=1)
    with pytest.raises(DataError, match="no word of the training rows can be replaced"):
        augment(data_of(ONE, [("12 the",)]), tokenizer, table, copies=1)


def test_real_words(minilm_path, data_dir):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    model = BertModel.from_pretrained(minilm_path)
    task = load_task("rte", data_dir=data_dir, limit=50)
    rows = augment(task, tokenizer, model, copies=3, seed=0)
    assert rows.column_names == ["sentence1", "sentence2"]
    assert 140 <= len(rows) <= 150
    near = Neighbours(Vocabulary(tokenizer), model.embeddings.word_embeddings.weight.detach(), 5)
    found = near.find(["film", "paris"])
    assert "movie" in found["film"]
    assert "france" in found["paris"] or "berlin" in found["paris"]
