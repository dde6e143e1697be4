"""Rows without a label: from text, from another task, and the stages that may learn from them."""

from dataclasses import replace

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kronbert.distill import Objective, Stage, Term, unlabelled_rows, unlabelled_text
from kronbert.distill import with_unlabelled as mixed
from kronbert.distill.data import load_folder, tokenize
from kronbert.distill.finetune import run_stage
from kronbert.distill.tasks import Task
from kronbert.distill.unlabelled import training_rows
from kronbert.errors import DataError, DistillError

PAIR = Task(name="pairs", text=("first", "second"), labels=("no", "yes"))
ONE = Task(name="ones", text=("said",), labels=("no", "yes"))
TEXT = """One two three. Four five "six!" (Seven) eight nine? Ten eleven twelve.

Short one. A b c d. E f g h.
Mr x went, e.g. to y; no end here
"""


def stage_of(*taps):
    objective = Objective(terms=tuple(Term(tap=tap) for tap in taps))
    return Stage(name="task", objective=objective, learning_rate=1e-3, epochs=1, batch_size=16)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_sentences_of_a_text(text):
    rows = unlabelled_text(ONE, text)
    assert rows.column_names == ["said"]
    assert list(rows["said"]) == [
        "One two three.", 'Four five "six!"', "(Seven) eight nine?", "Ten eleven twelve.",
        "A b c d.", "E f g h.", "Mr x went, e.g. to y; no end here",
    ]  # fmt: skip
    assert list(unlabelled_text(ONE, text, words=(1, 2))["said"]) == ["Short one."]
    assert len(unlabelled_text(ONE, text, limit=3)) == 3


def test_pairs_are_neighbours_of_one_paragraph(text):
    rows = unlabelled_text(PAIR, text)
    assert [(row["first"][:3], row["second"][:3]) for row in rows] == [
        ("One", "Fou"), ("(Se", "Ten"), ("A b", "E f"),
    ]  # fmt: skip
    # what is left out parts its neighbours: "Short one." and "A b c d." do not pair around a gap
    lines = datasets.Dataset.from_dict({"text": ["A b c. No. D e f. G h i."]})
    pairs = unlabelled_text(PAIR, lines)
    assert [tuple(row.values()) for row in pairs] == [("D e f.", "G h i.")]


def test_another_tasks_rows():
    rows = datasets.Dataset.from_dict({"a": ["1", "2", "3"], "b": ["x", "y", "z"]})
    as_pairs = unlabelled_rows(PAIR, rows, ("b", "a"))
    assert as_pairs[0] == {"first": "x", "second": "1"}
    assert list(unlabelled_rows(ONE, rows, ("a", "b"))["said"]) == ["1", "x", "2", "y", "3", "z"]
    assert list(unlabelled_rows(PAIR, rows, "a")) == [{"first": "1", "second": "2"}]
    assert len(unlabelled_rows(ONE, rows, "a", limit=2)) == 2
    assert unlabelled_rows(ONE, rows, "a").column_names == ["said"]
    gaps = datasets.Dataset.from_dict({"a": ["1", None, "3", " "], "b": ["x", "y", "z", "w"]})
    assert list(unlabelled_rows(ONE, gaps, "a")["said"]) == ["1", "3"]
    assert list(unlabelled_rows(PAIR, gaps, ("a", "b"))["second"]) == ["x", "z"]
    long = gaps.cast_column("a", datasets.Value("large_string"))
    assert list(unlabelled_rows(ONE, long, "a")["said"]) == ["1", "3"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rows: unlabelled_rows(ONE, rows, "c"), "expected one or two of 'a'"),
        (lambda rows: unlabelled_rows(PAIR, rows.select([0]), "a"), "no pair of sentences in it"),
        (lambda rows: unlabelled_rows(ONE, rows.add_column("n", [1, 2]), "n"), "'n' holds Value"),
        (lambda rows: unlabelled_rows(ONE, rows, "a", limit=0), "limit=0: expected"),
        (lambda rows: unlabelled_text(ONE, rows, words=(3, 2)), "expected fewest and most words"),
        (lambda rows: unlabelled_text(ONE, rows.rename_column("a", "text"), words=(9, 9)),
         "the data set: no sentence in it for the columns said"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        make(datasets.Dataset.from_dict({"a": ["one", "two"]}))


# Training


@pytest.fixture(scope="module")
def data(tiny_task):
    extra = datasets.Dataset.from_dict({"text": ["warm soup", "a cold and dull room"] * 40})
    return mixed(load_folder(tiny_task), extra)


def model_of(folder, seed):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_source_says_so(data):
    assert data.source.endswith("; 80 rows without a label")
    assert len(mixed(data, data.unlabelled).unlabelled) == 160
    assert mixed(data) is data


def test_tokenised_without_a_label(data, tokenizer):
    rows = tokenize(data, tokenizer)
    assert "labels" not in rows.unlabelled.column_names
    assert set(rows.train.column_names) == {*rows.unlabelled.column_names, "labels"}
    assert rows.unlabelled[1]["input_ids"] == tokenizer("a cold and dull room")["input_ids"]


def test_a_stage_on_soft_labels_sees_all_rows(data, tokenizer, tiny_bert, tmp_path, monkeypatch):
    rows = tokenize(data, tokenizer)
    every = training_rows(rows, stage_of("logits"))
    assert len(every) == len(rows.train) + 80
    assert every.column_names == rows.unlabelled.column_names
    assert every[len(rows.train)]["input_ids"] == rows.unlabelled[0]["input_ids"]
    student = model_of(tiny_bert, 1)
    log = run_stage(
        student, model_of(tiny_bert, 2), stage_of("logits"), rows, tmp_path, tokenizer=tokenizer,
        precision="fp32",
    )  # fmt: skip
    assert max(row["step"] for row in log) == (256 + 80) // 16
    assert any("eval_accuracy" in row for row in log)  # the dev set has its labels


def test_a_stage_on_labels_is_refused(data, tokenizer, tiny_bert, tmp_path):
    rows = tokenize(data, tokenizer)
    with pytest.raises(DistillError, match=r"80 of 336 training rows have none. Drop the"):
        run_stage(
            model_of(tiny_bert, 1), model_of(tiny_bert, 2), stage_of("logits", "labels"), rows,
            tmp_path / "run", tokenizer=tokenizer,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
    assert training_rows(replace(rows, unlabelled=None), stage_of("labels")) is rows.train


def test_rows_of_other_columns_are_refused(data, tokenizer):
    with pytest.raises(DataError, match=r"columns \['input_ids'.*before tokenize"):
        mixed(data, tokenize(data, tokenizer).unlabelled)
    half = replace(tokenize(replace(data, unlabelled=None), tokenizer), unlabelled=data.unlabelled)
    with pytest.raises(DistillError, match="tokenize both at once"):
        training_rows(half, stage_of("logits"))
