"""Damaged and wrong data files are named, with their line."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from kronbert.distill.data import load_folder, load_task, tokenize
from kronbert.distill.text import read_table
from kronbert.errors import DataError
from tests.data_files import SST2, folder, write


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
        (
            ".jsonl",
            '{"sentence": "a \\ud83d", "label": 1}\n',
            "line 1: column 'sentence' holds half",
        ),
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


@pytest.mark.parametrize("others", [(0.5, 1.5), (0, 1)])
def test_nan_is_no_label(others, tmp_path):
    """Python writes it into JSON, pandas into parquet, where a cell was empty."""
    rows = [{"sentence": "a", "label": value} for value in (others[0], float("nan"), others[1])]
    for name in ("train.jsonl", "dev.jsonl"):
        write(tmp_path / name, "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"train.jsonl, line 2: no label in column 'label'"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("length", "pair", "special"), [(1, False, 2), (2, False, 2), (3, True, 3)]
)
def test_a_length_that_leaves_no_text(length, pair, special, tmp_path, tiny_bert):
    head = "sentence1\tsentence2\tlabel\n" if pair else "sentence\tlabel\n"
    row = "a b\tc d" if pair else "a b c d"
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path / name, f"{head}{row}\tno\n{row}\tyes\n")
    data, tokenizer = load_folder(tmp_path), AutoTokenizer.from_pretrained(tiny_bert)
    said = rf"tokenize\(max_length={length}\): {special} tokens of a row are the tokenizer's own"
    with pytest.raises(DataError, match=said):
        tokenize(data, tokenizer, length)
    longer = tokenize(data, tokenizer, special + 1).train["input_ids"]
    assert {len(ids) for ids in longer} == {special + 1}


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


@pytest.mark.parametrize("odd", ["nan", "N/A", "inf", "0,143", "good"])
def test_a_score_that_is_no_number_makes_no_classes(tmp_path, odd):
    rows = "".join(f"a film\t{i}.5\n" for i in range(6))
    folder(
        tmp_path / "mine", f"sentence\tscore\n{rows}the room\t{odd}\n", f"sentence\tscore\n{rows}"
    )
    said = f"train.tsv, line 8: label '{odd}' in column 'score': expected a number, with a point"
    with pytest.raises(DataError, match=said):
        load_folder(tmp_path / "mine")
    assert len(load_folder(tmp_path / "mine", regression=False).task.labels) == 7


def test_decimal_commas(tmp_path):
    rows = "".join(f"a film\t{i},5\n" for i in range(6))
    folder(tmp_path / "mine", f"sentence\tscore\n{rows}", f"sentence\tscore\n{rows}")
    with pytest.raises(DataError, match=r"line 2: label '0,5' .* with a point"):
        load_folder(tmp_path / "mine")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train-00000-of-00002"], r"train: part 1 of 2 \(counted from 0\) is not there, 1 are"),
        (["train-00001-of-00002"], r"part 0 of 2"),
        (["train-00000-of-00001", "train-00000-of-00002"], "which one is meant"),
        (["train", "train-00000-of-00001"], "which one is meant"),
    ],
)
def test_shards_that_are_no_whole_set(tmp_path, names, said):
    for name in names:
        write(tmp_path / "sst2" / f"{name}.tsv", SST2)
    write(tmp_path / "sst2" / "dev.tsv", SST2)
    with pytest.raises(DataError, match=said):
        load_task("sst2", data_dir=tmp_path)


def test_a_question_beside_another_text_is_not_read_alone(tmp_path):
    rows = [
        {"question": "is the soup good", "passage": "it was a cold soup", "label": i % 2}
        for i in range(4)
    ]
    text = "\n".join(map(json.dumps, rows))
    write(tmp_path / "boolq" / "train.jsonl", text)
    write(tmp_path / "boolq" / "dev.jsonl", text)
    with pytest.raises(
        DataError, match=r"\('question',\) or \('question', 'passage'\) could be meant"
    ):
        load_folder(tmp_path / "boolq")
    pair = load_folder(tmp_path / "boolq", text=("question", "passage"))
    assert pair.task.text == ("question", "passage")


def test_two_columns_that_could_be_the_label(tmp_path):
    task = folder(tmp_path / "d", "text,score,target\na b,10,x\nb c,20,y\n", kind=".csv")
    with pytest.raises(DataError, match=r"'score' or 'target' could be meant.*--label-column"):
        load_folder(task)
    assert load_folder(task, label="target").task.labels == ("x", "y")


def test_rows_without_a_token(tmp_path, tiny_bert):
    """Of a tokenizer that adds none of its own, as GPT-2's."""
    task = folder(tmp_path / "d", "text,label\na,0\n,1\nb,1\n", kind=".csv")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    assert len(tokenize(load_folder(task), tokenizer).train) == 3
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match=r"1 rows without a token, such as \{'text': ''"):
        tokenize(load_folder(task), tokenizer)
