"""Tasks read from files, folders and the hub, without network."""

from __future__ import annotations

import csv
import json
import os
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest

from kronbert.distill import data as module
from kronbert.distill.data import load_folder, load_task
from kronbert.distill.tasks import TASKS
from kronbert.distill.text import load_text, read_table
from kronbert.errors import DataError
from tests.data_files import SST2, folder, write


def test_tsv_has_no_quoting_and_only_newline_ends_a_line(tmp_path):
    odd = 'say "hi" \u2028 \x85 \r\x0b there'
    table = read_table(write(tmp_path / "t.tsv.gz", f'sentence\tlabel\n{odd}\t1\n\n"open\t0\n'))
    assert table.columns == {"sentence": [odd, '"open'], "label": ["1", "0"]}
    assert table.lines == [2, 4]


def test_tsv_from_windows_loses_mark_and_carriage_return(tmp_path):
    table = read_table(write(tmp_path / "t.tsv", b"\xef\xbb\xbfsentence\tlabel\r\nhi\t1\r\n"))
    assert table.columns == {"sentence": ["hi"], "label": ["1"]}


def test_tsv_with_the_quoting_of_csv_is_read_as_it_stands_and_said(tmp_path):
    """As pandas and spreadsheets write it, and as some copies of QQP are."""
    text = 'text\tlabel\n"he said ""hi"""\t1\nplain\t0\n'
    with pytest.warns(UserWarning, match=r"t\.tsv: fields stand in quotation marks, doubled"):
        table = read_table(write(tmp_path / "t.tsv", text))
    assert table.columns["text"] == ['"he said ""hi"""', "plain"]
    for once in ('"all of it"', '"he said ""hi""" he', '"he "said" ""hi"""'):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = read_table(write(tmp_path / "u.tsv", f"text\tlabel\n{once}\t1\n"))
        assert table.columns["text"] == [once]


def test_csv_fields_may_be_long(tmp_path):
    text = "word " * 30_000
    before = csv.field_size_limit()
    table = read_table(write(tmp_path / "t.csv", f"text,label\n{text},1\n"))
    assert table.columns["text"] == [text]
    assert csv.field_size_limit() == before


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


# Real data


@pytest.mark.filterwarnings("ignore:.*fields stand in quotation marks")
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


def test_a_character_in_two_halves_is_read(tmp_path):
    whole = '{"text": "so \\ud83d\\ude00 good", "label": "a"}\n{"text": "b", "label": "b"}\n'
    read = load_folder(folder(tmp_path / "d", whole, kind=".jsonl"))
    assert read.train["text"][0] == "so \N{GRINNING FACE} good"


def test_class_names_that_differ_in_case_alone(tmp_path):
    task = folder(tmp_path / "d", "text,label\na,Pos\nb,pos\nc,neg\n", kind=".csv")
    order = ("neg", "pos", "Pos")
    assert load_folder(task, classes=order).task.labels == order
    assert load_folder(task, classes=("NEG", "POS", "pos")).task.labels == ("Pos", "neg", "pos")
    plain = folder(tmp_path / "e", "text,label\na,Pos\nc,neg\n", kind=".csv")
    assert load_folder(plain, classes=("POS", "Neg")).task.labels == ("Pos", "neg")
