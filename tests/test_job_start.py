"""Stage 2 from a pre-distilled student: which one suits, and what is taken from it."""

import json
import shutil
from dataclasses import replace

import datasets
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import kronbert
from kronbert import job as job_module
from kronbert import job_report, shipped
from kronbert.errors import DistillError, PlanError
from kronbert.job import CompressSettings, compress
from kronbert.job_begin import ROWS, hidden_error, row_batches
from kronbert.job_start import (
    Start,
    compare_teacher,
    describe_teacher,
    find_start,
    sample_entries,
    student_from,
)
from kronbert.pretrain import PretrainSettings, pretrain_student

DENSE = "bert.encoder.layer.0.intermediate.dense"
LAYER = f"{DENSE}.b"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_packaged(tmp_path, monkeypatch):
    """What the package carries is not looked at here; the report's latency is timed briefly."""
    monkeypatch.setattr(shipped, "PACKAGED", tmp_path / "packaged")
    full = job_report.report
    monkeypatch.setattr(job_report, "report", lambda *a, **k: full(*a, **{**k, "seconds": 0.05}))


@pytest.fixture(scope="module")
def learnt(tiny_bert, tiny_task, tmp_path_factory, one_thread):
    """(folder, report) of a student that pretrain-student wrote, 3 times smaller."""
    folder = tmp_path_factory.mktemp("learnt")
    return pretrained(tiny_bert, tiny_task, folder)


def pretrained(model, task, folder, **more):
    text = folder / "text.txt"
    rows = (task / "train.tsv").read_text().splitlines()[1:]
    text.write_text("\n".join(row.split("\t")[0] for row in rows) + "\n")
    settings = PretrainSettings(
        model=str(model), text=str(text), output=str(folder / "out"), epochs=2, batch_size=8,
        learning_rate=3e-3, max_length=16, precision="fp32", **{"factor": 3.0} | more,
    )  # fmt: skip
    report = pretrain_student(settings, lambda _: None)
    return folder / "out" / "student", report


@pytest.fixture
def named(learnt, tmp_path, monkeypatch):
    """The student under the name kronbert/tiny-x3."""
    shutil.copytree(learnt[0], tmp_path / "students" / "tiny-x3")
    monkeypatch.setenv("KRONBERT_STUDENTS", str(tmp_path / "students"))
    return "kronbert/tiny-x3"


@pytest.fixture(scope="module")
def teacher(tiny_bert):
    """A classifier whose body was moved a little, as fine-tuning moves it."""
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model.eval()


def settings_for(tiny_bert, task, output, **changes):
    given = {"model": str(tiny_bert), "task": str(task), "output": str(output), "factor": 3.0,
             "teacher_epochs": 0.2, "epochs": 0.1, "learning_rate": 1e-7, "batch_size": 16,
             "precision": "fp32"}  # fmt: skip
    return CompressSettings(**given | changes)


def open_classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def state_of(folder):
    return open_classifier(folder).state_dict()


def test_body_is_the_students_and_the_rest_the_teachers(learnt, teacher, tokenizer):
    start = find_start(str(learnt[0]), teacher, tokenizer, 3.0, None)
    assert 0.9 < start.cosine < 1
    assert start.name == "out"  # of out/student
    student = student_from(start, teacher, factor=3.0, preset=None)
    body = kronbert.load(learnt[0])
    for name, value in body.state_dict().items():
        if not name.startswith("pooler."):
            assert torch.equal(student.bert.state_dict()[name], value), name
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])
    # The pooler, which nothing taught, is the teacher's in the student's shape.
    shapes = {x.size.name: x.groups for x in body.kronecker_plan.converted}["pooler.dense"]
    spec = " + ".join(shape.spec for shape in shapes)
    own = kronbert.convert(teacher, rules={"bert.pooler.dense": spec}).state_dict()
    assert sum("pooler" in name for name in own) == 3
    for name in (n for n in own if "pooler" in n):
        assert torch.equal(student.state_dict()[name], own[name]), name
    assert student.kronecker_plan.dense_parameters == teacher.num_parameters()
    assert student.num_parameters() <= teacher.num_parameters() / (0.995 * 3)


def test_masked_lm_student_gives_its_body(tiny_bert, tiny_task, teacher, tokenizer, tmp_path):
    masked = tmp_path / "masked"
    AutoModelForMaskedLM.from_pretrained(tiny_bert).save_pretrained(masked)
    tokenizer.save_pretrained(masked)
    folder, report = pretrained(masked, tiny_task, tmp_path)
    assert report["student"]["class"] == "BertForMaskedLM"
    start = find_start(str(folder), teacher, tokenizer, 3.0, None)
    student = student_from(start, teacher, factor=3.0, preset=None)
    body = kronbert.load(folder).bert.state_dict()
    assert not any("pooler" in name for name in body)
    for name, value in body.items():
        assert torch.equal(student.bert.state_dict()[name], value), name
    own = kronbert.convert(teacher, factor=3.0).state_dict()
    for name in (n for n in own if "pooler" in n):
        assert torch.equal(student.state_dict()[name], own[name]), name


def changed(folder, to, change):
    copy = shutil.copytree(folder, to)
    report = json.loads((copy / "report.json").read_text())
    change(report)
    (copy / "report.json").write_text(json.dumps(report))
    return copy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["teacher"]["sizes"].update(hidden_size=48), "its teacher has hidden_size 48"),
        (lambda r: r["teacher"].update(vocabulary="x"), "another vocabulary"),
        (lambda r: r["student"].update(factor=3.4), "3.40 times smaller, 3 is asked for"),
        (lambda r: r["student"].update(factor=2.9), "2.90 times smaller, 3 is asked for"),
        (
            lambda r: r["teacher"].update(
                embedding_digest="x",
                embedding_sample=r["teacher"]["embedding_sample"][::-1],
            ),
            r"word embeddings differ \(cosine -?0\.",
        ),
    ],
)
def test_what_does_not_suit(change, said, learnt, teacher, tokenizer, tmp_path, monkeypatch):
    folder = changed(learnt[0], tmp_path / "students" / "odd", change)
    with pytest.raises(DistillError, match=rf"--student .*odd: .*{said}"):
        find_start(str(folder), teacher, tokenizer, 3.0, None)
    monkeypatch.setenv("KRONBERT_STUDENTS", str(tmp_path / "students"))
    assert find_start(None, teacher, tokenizer, 3.0, None) is None


def test_preset_and_missing_report(learnt, teacher, tokenizer, tmp_path):
    with pytest.raises(DistillError, match="not made with preset K8"):
        find_start(str(learnt[0]), teacher, tokenizer, None, "K8")
    made = changed(learnt[0], tmp_path / "k8", lambda r: r["asked"].update(preset="k8"))
    assert find_start(str(made), teacher, tokenizer, None, "K8").cosine > 0.9
    (made / "report.json").unlink()
    with pytest.raises(DistillError, match=r"has no report\.json"):
        find_start(str(made), teacher, tokenizer, None, "K8")
    with pytest.raises(DistillError, match=r"hub does not give its report\.json"):
        find_start("kronbert/nobody", teacher, tokenizer, 3.0, None)


def test_found_by_itself_unless_told_not_to(named, teacher, tokenizer, tiny_bert):
    found = find_start(None, teacher, tokenizer, 3.0, None)
    assert found.name == named
    assert find_start(named, teacher, tokenizer, 3.0, None) == found
    assert find_start("none", teacher, tokenizer, 3.0, None) is None
    assert find_start(None, teacher, tokenizer, 4.0, None) is None
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    assert find_start(None, base, tokenizer, 3.0, None).cosine == 1


def test_sample_tells_tables_apart(teacher, tokenizer):
    first = describe_teacher(teacher, tokenizer)
    assert len(first["embedding_sample"]) == 512
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize("rows", [8, 512, 520, 1000])
def test_a_sample_has_every_column_of_a_table(rows):
    found = sample_entries(torch.arange(rows * 64).view(rows, 64))
    assert len(found) == 512
    assert len(set((found % 64).tolist())) == 64
    assert found[-1] > 0.9 * 64 * rows


def test_the_first_student_that_suits_is_found(teacher, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("KRONBERT_STUDENTS", str(tmp_path))
    own = describe_teacher(teacher, tokenizer)
    factors = {"a": None, "b": 3.4, "c": 2.986, "d": 3.299, "e": 2.98}
    for name, factor in factors.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if factor is not None:
            report = {"teacher": own, "student": {"factor": factor}, "asked": {"preset": None}}
            (tmp_path / name / "report.json").write_text(json.dumps(report))
    found = find_start(None, teacher, tokenizer, 3.0, None)
    assert (found.name, found.factor, found.cosine) == ("kronbert/c", 2.986, 1.0)
    assert find_start("kronbert/d", teacher, tokenizer, 3.0, None).factor == 3.299
    for name in ("b", "e"):
        with pytest.raises(DistillError, match="3 is asked for"):
            find_start(f"kronbert/{name}", teacher, tokenizer, 3.0, None)


def test_word_embeddings_may_differ_a_little(teacher, tokenizer):
    own = describe_teacher(teacher, tokenizer)
    mine = torch.tensor(own["embedding_sample"], dtype=torch.float64)
    other = torch.randn(512, dtype=torch.float64)
    other -= (other @ mine) / (mine @ mine) * mine
    other *= mine.norm() / other.norm()

    def found(cosine):
        mixed = cosine * mine + (1 - cosine**2) ** 0.5 * other
        base = own | {"embedding_digest": "x", "embedding_sample": mixed.tolist()}
        return compare_teacher(own, {"teacher": base, "student": {"factor": 3.0}}, 3.0, None)

    assert found(0.91) == pytest.approx(0.91)
    assert found(0.89) == "its teacher's word embeddings differ (cosine 0.890)"


def test_compress_of_fewer_layers_starts_from_one_of_these(
    named, tiny_bert, tiny_task, teacher, tokenizer, tmp_path, monkeypatch
):
    folder, _ = pretrained(tiny_bert, tiny_task, tmp_path, layers=1)
    assert find_start(None, teacher, tokenizer, 3.0, None, layers=1) is None
    shutil.copytree(folder, tmp_path / "students" / "a-shallow")
    assert find_start(None, teacher, tokenizer, 3.0, None).name == named
    assert find_start(None, teacher, tokenizer, 3.0, None, layers=2).name == named
    assert find_start(None, teacher, tokenizer, 3.0, None, layers=1).name == "kronbert/a-shallow"
    with pytest.raises(DistillError, match="it has 1 layers, 2 are asked for"):
        find_start(str(folder), teacher, tokenizer, 3.0, None)
    with pytest.raises(DistillError, match="it has 2 layers, 1 are asked for"):
        find_start(named, teacher, tokenizer, 3.0, None, layers=1)
    output = tmp_path / "compressed"
    asked = {"student": str(folder), "layers": 1, "epochs": 0.1}
    content = compress(settings_for(tiny_bert, tiny_task, output, **asked), lambda _: None)
    assert content["start"] == {"name": "out", "cosine": 1.0}
    begun, learnt = open_classifier(output / "start"), kronbert.load(folder)
    assert begun.config.num_hidden_layers == 1
    for name, value in learnt.state_dict().items():
        if not name.startswith("pooler."):
            assert torch.equal(begun.bert.state_dict()[name], value), name


def test_compress_starts_from_it(named, learnt, tiny_bert, tiny_task, tmp_path):
    said = []
    output = tmp_path / "out"
    content = compress(settings_for(tiny_bert, tiny_task, output), said.append)
    near, far = (content["hidden_errors"][name] for name in (named, "fitted"))
    assert near < far
    assert f"{named}: {near:.3f} from the teacher's hidden states, taken" in said
    assert f"fitted: {far:.3f} from the teacher's hidden states, left" in said
    assert content["start"] == {"name": named, "cosine": 1.0}
    assert "| student, from kronbert/tiny-x3 |" in (output / "report.md").read_text()
    stage1, teacher, body = (
        state_of(output / "start"), state_of(output / "teacher"), kronbert.load(learnt[0])
    )  # fmt: skip
    assert torch.equal(stage1[LAYER], body.state_dict()[LAYER.removeprefix("bert.")])
    assert torch.equal(stage1["classifier.weight"], teacher["classifier.weight"])
    # Stage 2 at a rate of 1e-7 leaves the body as it came.
    student = state_of(output / "student")
    torch.testing.assert_close(student[LAYER], stage1[LAYER], atol=1e-4, rtol=0)
    plain = compress(
        settings_for(tiny_bert, tiny_task, tmp_path / "plain", student="none"), said.append
    )
    assert plain["start"] is None
    assert list(plain["hidden_errors"]) == ["fitted"]
    converted = open_classifier(tmp_path / "plain" / "start")
    found = open_classifier(tmp_path / "plain" / "student").get_submodule(DENSE).weight
    expected = converted.get_submodule(DENSE).weight
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    taken = open_classifier(output / "student").get_submodule(DENSE).weight
    assert (taken - expected).abs().max() > 1e-2
    assert "student, fitted to the teacher" in (tmp_path / "plain" / "report.md").read_text()


def test_a_base_models_student_is_left_where_fine_tuning_went_far(
    named, tiny_bert, tiny_task, tmp_path
):
    far = settings_for(tiny_bert, tiny_task, tmp_path / "far", teacher_epochs=8,
                       teacher_learning_rate=1e-2)  # fmt: skip
    content = compress(far, lambda _: None)
    assert content["hidden_errors"]["fitted"] < content["hidden_errors"][named]
    assert content["start"] is None
    asked = compress(replace(far, output=str(tmp_path / "asked"), student=named), lambda _: None)
    assert asked["start"]["name"] == named
    assert list(asked["hidden_errors"]) == [named]


def test_choice_is_kept_when_resumed(named, tiny_bert, tiny_task, tmp_path, monkeypatch):
    """A student that is installed, or removed, between two starts does not change the run."""
    settings = settings_for(tiny_bert, tiny_task, tmp_path / "with")
    without = replace(settings, output=str(tmp_path / "without"))
    real = job_module._Job._teacher
    monkeypatch.setattr(job_module._Job, "_teacher", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(settings, lambda _: None)
    monkeypatch.setenv("KRONBERT_STUDENTS", str(tmp_path / "nobody"))
    with pytest.raises(ZeroDivisionError):
        compress(without, lambda _: None)
    monkeypatch.setattr(job_module._Job, "_teacher", real)
    assert compress(settings, lambda _: None)["start"]["name"] == named
    monkeypatch.setenv("KRONBERT_STUDENTS", str(tmp_path / "students"))
    assert compress(without, lambda _: None)["start"] is None


def test_errors_come_before_training(named, tiny_bert, tiny_task, tmp_path):
    with pytest.raises(PlanError, match=r"student= and stage1_text="):
        settings_for(tiny_bert, tiny_task, tmp_path, student=named, stage1_text="x.txt")
    assert settings_for(tiny_bert, tiny_task, tmp_path, student="none", stage1_text="x.txt")
    with pytest.raises(DistillError, match="4 is asked for"):
        compress(settings_for(tiny_bert, tiny_task, tmp_path / "a", student=named, factor=4.0))
    assert not (tmp_path / "a" / "teacher").exists()


def test_an_incomplete_body_is_refused(learnt, teacher, tmp_path):
    from kronbert.job_start import put_body

    student = student_from(
        Start(name="x", source=str(learnt[0]), factor=3.0, cosine=1.0), teacher, factor=3.0
    )
    body = dict(student.bert.state_dict())
    del body["encoder.layer.0.intermediate.dense.b"]
    with pytest.raises(DistillError, match=r"x: it has no 'encoder\.layer\.0\.intermediate"):
        put_body(student, body, "x")
    with pytest.raises(DistillError, match="x: it has 'head'"):
        put_body(student, {**student.bert.state_dict(), "head": torch.zeros(1)}, "x")


def test_hidden_error_counts_tokens_not_padding(teacher, tokenizer, tiny_bert):
    other = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    texts = ["the soup was good", "bad", "the film was fine and the room was kind"]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    single = [dict(tokenizer([text], return_tensors="pt")) for text in texts]
    assert hidden_error(teacher, teacher, [batch]) == 0
    whole, parts = hidden_error(other, teacher, [batch]), hidden_error(other, teacher, single)
    assert whole == pytest.approx(parts, rel=1e-4)
    states = [
        torch.cat([torch.cat(model(**one, output_hidden_states=True).hidden_states[1:], 2)
                   for one in single], 1)
        for model in (other, teacher)
    ]  # fmt: skip
    width = teacher.config.hidden_size
    expected = (states[0] - states[1]).square().sum(2).mean() / width
    assert whole == pytest.approx(float(expected.detach()), rel=1e-4)


def test_batches_to_fit_on_are_of_like_lengths_in_no_order(tokenizer):
    lengths = [3 + i % 120 for i in range(5 * ROWS + 7)]
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[i + 5] * n for i, n in enumerate(lengths)],
         "attention_mask": [[1] * n for n in lengths], "labels": lengths}
    )  # fmt: skip
    batches = row_batches(rows, 10_000, 3, tokenizer)
    assert sorted(int(row[0]) for b in batches for row in b["input_ids"]) == list(range(5, 332))
    assert all(set(b) >= {"input_ids", "attention_mask"} and "labels" not in b for b in batches)
    padded = sum(b["input_ids"].numel() for b in batches)
    assert padded < 1.2 * sum(lengths)
    assert sum(int(b["attention_mask"].sum()) for b in batches) == sum(lengths)
    widths = [b["input_ids"].shape[1] for b in batches]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)
    again, other = (row_batches(rows, 10_000, seed, tokenizer) for seed in (3, 4))
    for one, same in zip(batches, again, strict=True):
        assert torch.equal(one["input_ids"], same["input_ids"])
    assert [b["input_ids"].shape for b in other] != [b["input_ids"].shape for b in batches]
    few = row_batches(rows, 2 * ROWS, 3, tokenizer)
    assert [len(b["input_ids"]) for b in few] == [ROWS, ROWS]
    assert max(b["input_ids"].shape[1] for b in few) > 100
