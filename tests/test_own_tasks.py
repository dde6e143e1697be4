"""Tasks that are not GLUE's: their columns, classes, units and lengths, and who is told of them."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from kronbert.distill.data import load_folder, load_task, tokenize
from kronbert.distill.recipes.kronbert import SPREAD
from kronbert.distill.score_head import output_layer
from kronbert.distill.score_scale import scale_of, standardised, take_unit
from kronbert.errors import DataError
from kronbert.job import compress
from kronbert.job_models import open_encoder
from kronbert.job_rows import MEASURED, cut_rows, open_data, splices_for, tokens_in
from kronbert.job_scores import scores_of
from kronbert.job_stages import Schedule
from tests.data_files import write
from tests.job_runs import settings_for

pytestmark = pytest.mark.usefixtures("one_thread", "hurried_report")

WORDS = ("good", "bad")


def task_of(folder, rows, kind="jsonl", dev=None):
    """train.* and dev.* of (text, label) pairs, or of dictionaries."""
    for name, given in (("train", rows), ("dev", dev or rows)):
        asked = [row if isinstance(row, dict) else dict(zip(("text", "label"), row, strict=True))
                 for row in given]  # fmt: skip
        write(folder / f"{name}.{kind}", "".join(json.dumps(row) + "\n" for row in asked))
    return folder


def test_a_pairs_second_text_may_be_missing(tmp_path):
    rows = [{"text1": "a", "text2": None, "label": "x"}, {"text1": "b", "label": "y"},
            {"text1": "c", "text2": "d", "label": "y"}]  # fmt: skip
    assert load_folder(task_of(tmp_path / "pairs", rows)).train["text2"][:] == ["", "", "d"]
    rows[0]["text1"] = None
    with pytest.raises(DataError, match=r"line 1: column 'text1' is None"):
        load_folder(task_of(tmp_path / "pairs", rows))


def test_several_labels_a_row_are_refused(tmp_path):
    task = task_of(tmp_path / "several", [("a", ["x"]), ("b", ["x", "y"])])
    with pytest.raises(DataError, match=r"line 1: label \['x'\] .*one class or one number a row"):
        load_folder(task)


def test_whether_numbers_are_scores(tmp_path):
    whole = str(task_of(tmp_path / "whole", [("a", 1), ("b", 3), ("c", 5)]))
    pointed = str(task_of(tmp_path / "pointed", [("a", 0.0), ("b", 1.0), ("c", 2.0)]))
    words = str(task_of(tmp_path / "words", [("a", "x"), ("b", "y"), ("c", "z")]))
    score, three = (True, None), (False, ["LABEL_0", "LABEL_1", "LABEL_2"])

    def classes(folder, **asked):
        return open_data(folder, **asked).task.labels

    assert classes(whole) == ("1", "3", "5")
    assert classes(pointed) is None
    assert classes(whole, head=score) is None
    assert classes(pointed, head=three) == ("0", "1", "2")
    assert classes(words, head=score) == ("x", "y", "z")  # and the head does not suit
    assert classes(whole, head=three, regression=True) is None
    assert classes(pointed, head=score, regression=False) == ("0", "1", "2")
    (tmp_path / "pointed" / "dev.jsonl").write_text('{"text": "d", "label": 2}\n')
    found = open_data(pointed, regression=False).validation["validation"]
    assert found["label"][:] == [2]
    with pytest.raises(DataError, match=r"--regression and --classes are for a folder"):
        open_data("sst2", regression=True)
    with pytest.raises(DataError, match=r"unknown label 7 .*or scores \(regression=True"):
        load_folder(task_of(tmp_path / "rare", [("a", 1), ("b", 3)], dev=[("c", 7)]))


def test_classes_stand_in_the_order_of_the_teachers_head(tmp_path):
    task = str(task_of(tmp_path / "three", [("a", "neg"), ("b", "neu"), ("c", "pos")]))
    data = open_data(task, head=(False, ["Pos", "Neu", "Neg"]))
    assert data.task.labels == ("pos", "neu", "neg")
    assert data.train["label"][:] == [2, 1, 0]
    assert open_data(task, head=(False, ["a", "b", "c"])).task.labels == ("neg", "neu", "pos")


def test_a_folder_named_like_glues_has_no_schedule_of_its_own(tiny_bert, tiny_task, tmp_path):
    """GLUE's sst2 has 67,349 rows: its schedule would leave 256 of them a handful of steps."""
    config, tokenizer = (auto.from_pretrained(tiny_bert) for auto in (AutoConfig, AutoTokenizer))
    named = shutil.copytree(tiny_task, tmp_path / "sst2")
    settings = settings_for(tiny_bert, named, tmp_path / "out", epochs=None, splice=None)
    made = [
        Schedule.of(settings, load_folder(folder), config, tokenizer, 64)
        for folder in (tiny_task, named)
    ]
    assert made[0].tokens_wanted > 0
    assert made[0] == made[1]


def test_a_part_of_glues_rows_has_the_schedule_of_few(tiny_bert, tiny_task, glue, tmp_path):
    config, tokenizer = (auto.from_pretrained(tiny_bert) for auto in (AutoConfig, AutoTokenizer))
    settings = settings_for(tiny_bert, "sst2", tmp_path / "out", epochs=None, splice=None)
    part, own = (
        Schedule.of(settings, data, config, tokenizer, 64)
        for data in (load_task("sst2", data_dir=glue / "glue"), load_folder(tiny_task))
    )
    assert part == own


def scheduled(tiny_bert, task, most=64, hidden=32, **asked):
    config = AutoConfig.from_pretrained(tiny_bert, hidden_size=hidden)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, model_max_length=most)
    settings = settings_for(tiny_bert, task, "out", **asked)
    return Schedule.of(settings, load_folder(task), config, tokenizer, most)


def test_settings_change_every_stage_and_steps_keep_their_shares(tiny_bert, tiny_task):
    made = scheduled(
        tiny_bert, tiny_task, epochs=5.0, learning_rate=3e-3, batch_size=12, seed=7, max_length=20,
        cache_teacher=True, stage1_text="x", stage1_epochs=3.0, stage1_learning_rate=2e-2,
        teacher_epochs=4.0, teacher_learning_rate=5e-5,
    )  # fmt: skip
    first, last = made.on_task
    assert (first.epochs, last.epochs) == pytest.approx((10 / 3, 5 / 3))
    assert (first.learning_rate, last.learning_rate) == pytest.approx((3e-3, 6e-4))
    assert (first.cache_teacher, last.cache_teacher) == (True, True)
    assert (made.general.epochs, made.general.learning_rate) == (3.0, 2e-2)
    assert (made.for_teacher.epochs, made.for_teacher.learning_rate) == (4.0, 5e-5)
    stages = (made.for_teacher, made.general, first, last)
    assert {(s.batch_size, s.max_length, s.seed) for s in stages} == {(12, 20, 7)}
    assert made.max_length == 20


@pytest.mark.parametrize(("hidden", "rate"), [(32, 1e-4), (511, 1e-4), (512, 3e-5), (768, 3e-5)])
def test_small_teachers_learn_faster(hidden, rate, tiny_bert, tiny_task):
    made = scheduled(tiny_bert, tiny_task, hidden=hidden, teacher_learning_rate=None)
    assert made.for_teacher.learning_rate == rate


def test_rows_have_the_task_s_length_where_the_model_takes_it(tiny_bert, tiny_task):
    own = load_folder(tiny_task).task.max_length
    assert own > 64
    for most, asked, length in ((64, None, 64), (1024, None, own), (64, 64, 64)):
        assert scheduled(tiny_bert, tiny_task, most, max_length=asked).max_length == length


def test_tokens_are_those_of_rows_drawn_from_all(tiny_bert, tmp_path):
    """A third of the rows has 3 tokens and comes first; the others have 12."""
    texts = ["good"] * MEASURED + ["good " * 10] * (2 * MEASURED)
    rows = [(text, "xy"[i % 2]) for i, text in enumerate(texts)]
    data = load_folder(task_of(tmp_path / "many", rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    assert tokens_in(data, tokenizer) == pytest.approx(27 * MEASURED, rel=0.05)
    assert tokens_in(data, tokenizer, 6) == pytest.approx(15 * MEASURED, rel=0.05)
    assert splices_for(data, tokenizer, 36 * MEASURED) == pytest.approx(MEASURED, rel=0.2)
    assert splices_for(data, tokenizer, 9 * MEASURED) == splices_for(data, tokenizer, 0) == 0


def test_rows_that_are_cut_are_named(tiny_bert, tmp_path):
    long, short = "good " * 40, "bad"
    rows = [(long, "x") if i % 4 == 0 else (short, "y") for i in range(40)]
    data = load_folder(task_of(tmp_path / "long", rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    said = "25 % of the rows are longer than 16 tokens and are cut there"
    assert cut_rows(data, tokenizer, 16, 32) == (
        f"{said}; --max-length 32 is the most that the model takes"
    )
    tokenizer.model_max_length = 512
    assert cut_rows(data, tokenizer, 16, 512) == f"{said}; --max-length 256 cuts 0 %"
    assert cut_rows(data, tokenizer, 42, 512) is None


@pytest.mark.parametrize(
    ("long", "rows", "length", "most", "said"),
    [
        (1, 100, 16, 512, "1 % of the rows are longer than 16 tokens and are cut there; --max-len"),
        (1, 101, 16, 512, None),
        (10, 40, 16, 256, "--max-length 256 is the most that the model takes"),
        (10, 40, 16, 1024, "--max-length 512 cuts 0 %"),  # 256 would cut as many
        (1, 50, 280, 1024, "--max-length 512 cuts 0 %"),  # and 256 is less than it has
        (10, 40, 64, 64, "25 % of the rows are longer than 64 tokens and are cut there, the most"),
    ],
)
def test_the_length_that_would_cut_fewer_rows(long, rows, length, most, said, tiny_bert, tmp_path):
    texts = [("good " * 300, "x")] * long + [("bad", "y")] * (rows - long)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, model_max_length=1024)
    found = cut_rows(load_folder(task_of(tmp_path / "long", texts)), tokenizer, length, most)
    assert found is said is None or said in found


def test_which_rows_a_name_and_a_folder_mean(glue, tmp_path):
    task = task_of(tmp_path / "sst2", [("good", "x"), ("bad", "y"), ("fine", "x")])
    drawn = [open_data(str(task), limit=2, seed=seed).train[:] for seed in range(6)]
    assert any(one != drawn[0] for one in drawn)
    with pytest.raises(DataError, match="is a folder itself: leave --data-dir out"):
        open_data(str(task), data_dir=str(glue / "glue"))
    assert len(open_data("sst2", data_dir=str(glue / "glue")).train) == 64
    assert len(open_data("sst2", data_dir=str(glue / "glue"), limit=5).train) == 5


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory):
    """The words that tell the class are the last twelve of 40."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("texts") / "documents"
    made = []
    for i in range(192):
        filler = rng.choices(("the", "film", "was", "room"), k=28)
        made.append((" ".join([*filler, *[WORDS[i % 2]] * 12]), ("yes", "no")[i % 2]))
    return task_of(folder, made[:128], dev=made[128:])


def test_a_student_is_scored_again_at_its_own_length(tiny_bert, long_texts, tmp_path):
    said = []
    settings = settings_for(
        tiny_bert, long_texts, tmp_path / "out", max_length=48, teacher_epochs=6
    )
    content = compress(settings, said.append)
    assert content["scores"]["student"]["validation"]["accuracy"] > 0.9
    again = scores_of(str(tmp_path / "out" / "student"), str(long_texts))
    assert again.max_length == 48
    assert again.scores == content["scores"]["student"]
    assert not [line for line in said if "are cut there" in line or "learnt nothing" in line]
    foreign = shutil.copytree(tmp_path / "out" / "student", tmp_path / "foreign")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer("a film", truncation=True, max_length=16)  # which tokenizers save with themselves
    tokenizer.save_pretrained(foreign)
    assert scores_of(str(foreign), str(long_texts)).max_length == 64
    shorter = scores_of(str(tmp_path / "out" / "student"), str(long_texts), max_length=16)
    assert shorter.scores["validation"]["accuracy"] < 0.7
    # the same teacher, whose rows lose the word that counts
    teacher = tmp_path / "out" / "teacher"
    settings = settings_for(teacher, long_texts, tmp_path / "cut", max_length=16, epochs=0.2)
    compress(settings, said.append)
    (cut,) = [line for line in said if line.startswith("100 % of the rows are longer than 16")]
    assert cut in (tmp_path / "cut" / "report.md").read_text()
    (line,) = [line for line in said if "learnt nothing" in line]
    assert "on validation, the commonest class 0.500" in line


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The same rows with scores of 0 to 4, and of -1000 to 3000."""
    rng = random.Random(0)
    rows = []
    for _ in range(160):
        good = rng.randint(0, 4)
        words = ["good"] * good + ["bad"] * (4 - good)
        rng.shuffle(words)
        rows.append((" ".join(words), good))
    root = tmp_path_factory.mktemp("scores")
    return [
        task_of(root / name, [(text, float(scale(good))) for text, good in rows])
        for name, scale in (("few", lambda x: x), ("many", lambda x: 1000 * x - 1000))
    ]


def test_scores_train_alike_in_every_unit(tiny_bert, scored, tmp_path):
    found = []
    for task in scored:
        settings = settings_for(tiny_bert, task, tmp_path / task.name, teacher_epochs=4, epochs=2)
        content = compress(settings, lambda _: None)
        found.append([content["scores"][who]["validation"]["spearman"] for who in
                      ("teacher", "student")])  # fmt: skip
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / task.name / "teacher")
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        with torch.no_grad():
            given = model(**tokenizer(["bad bad bad bad", "good good good good"],
                                      return_tensors="pt")).logits[:, 0]  # fmt: skip
        unit = 1000 if task.name == "many" else 1
        assert given[1] - given[0] > 1.5 * unit, "the head does not speak the task's unit"
    assert min(found[0]) > 0.8
    assert found[1] == pytest.approx(found[0], abs=0.03)


def test_a_head_takes_the_unit_of_its_scores(tiny_bert, scored):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1).eval()
    assert output_layer(model) is model.classifier
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    inputs = tokenizer(["good film", "bad"], return_tensors="pt", padding=True)
    with torch.no_grad():
        before = model(**inputs).logits
        take_unit(model, 20.0, 5.0)
        torch.testing.assert_close(model(**inputs).logits, 5 * before + 20)
    assert output_layer(AutoModel.from_pretrained(tiny_bert)) is None
    rows = standardised(tokenize(load_folder(scored[1]), tokenizer), 0.0, 1000.0)
    assert {*rows.train["labels"][:]} == {-1.0, 0.0, 1.0, 2.0, 3.0}


def test_square_errors_of_scores_weigh_alike_in_every_unit(tiny_bert, scored):
    for task in scored:
        made = scheduled(tiny_bert, task)
        scores = np.array(load_folder(task).train["label"])
        assert made.scale == pytest.approx((scores.mean(), scores.std()))
        answers = made.on_task[-1].objective.terms[-1]
        assert answers.loss == "mse"
        assert answers.weight == pytest.approx(SPREAD / scores.var(), rel=1e-2)


def test_dev_rows_are_standardised_too(tiny_bert, scored):
    rows = tokenize(load_folder(scored[1]), AutoTokenizer.from_pretrained(tiny_bert))
    found = standardised(rows, 0.0, 1000.0)
    for part in (found.train, *found.validation.values()):
        assert {*part["labels"][:]} == {-1.0, 0.0, 1.0, 2.0, 3.0}
    assert scale_of(found) == pytest.approx([one / 1000 for one in scale_of(rows)])


def test_equal_scores_are_refused(tiny_bert, tmp_path):
    task = task_of(tmp_path / "flat", [("good", 2.0), ("bad", 2.0)])
    settings = settings_for(tiny_bert, task, tmp_path / "out")
    with pytest.raises(DataError, match="every score of the training rows is 2: there is nothing"):
        compress(settings, lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_trained_in_full(tiny_bert, tiny_task, tmp_path, dtype):
    half = tmp_path / "half"
    AutoModel.from_pretrained(tiny_bert).to(dtype).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(half)
    assert {p.dtype for p in open_encoder(str(half)).parameters()} == {torch.float32}  # stage 1's
    settings = settings_for(half, tiny_task, tmp_path / "out", teacher_epochs=0.5, epochs=0.2)
    compress(settings, lambda _: None)
    for who in ("teacher", "student"):
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / who)
        assert {p.dtype for p in saved.parameters()} == {torch.float32}
