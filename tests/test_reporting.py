"""The report against hand counts and the plan."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTModel,
)

import kronbert
from kronbert import latency, reporting
from kronbert.errors import ReportError
from kronbert.latency import Timing
from kronbert.reporting import SCHEMA, Report, linear_flops, report
from kronbert.weight_errors import weight_errors

HIDDEN, FORWARD, LAYERS, VOCABULARY, POSITIONS, LABELS = 48, 96, 2, 240, 64, 3


def bert_config(**changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "num_labels": LABELS,
    }
    return BertConfig(**{**sizes, **changes})


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config()).eval()


@pytest.fixture(scope="module")
def student(teacher):
    rules = {"re:.*(query|key)": "6:2x24*24x2", "re:.*intermediate.dense": "4:3x24*32x2"}
    return kronbert.convert(teacher, factor=4, rules=rules)


@pytest.fixture(scope="module")
def timed(student, teacher):
    return report(student, teacher, batch_sizes=(1, 3), sequence_length=16, seconds=0.02)


def test_counts_equal_those_by_hand(student, teacher):
    made = report(student, teacher, latency=False, sequence_length=16)
    h, f = HIDDEN, FORWARD
    layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 2 * 2 * h
    tables = (VOCABULARY + POSITIONS + 2) * h + 2 * h
    heads = (h * h + h) + (h * LABELS + LABELS)
    assert made.teacher.parameters == tables + LAYERS * layer + heads
    assert made.teacher.bytes_by_dtype == {"float32": 4 * made.teacher.parameters}
    per_token = LAYERS * (4 * (2 * h - 1) * h + (2 * h - 1) * f + (2 * f - 1) * h)
    assert made.teacher.linear_flops == 16 * per_token
    plan = student.kronecker_plan
    assert made.student.parameters == plan.parameters
    assert made.student.bytes == 4 * plan.parameters
    assert made.student.linear_flops == plan.linear_flops(16)
    assert made.factor == pytest.approx(plan.factor)
    assert made.latency_ratio == made.student.latency == {}


@pytest.mark.parametrize(
    "preset_like", [{"re:.*query": "8x12⊗6x4 + 12x8⊗4x6"}, {"re:.*": {"rank": 2}}]
)
def test_flops_equal_the_plans_for_sums_and_low_rank(teacher, preset_like):
    converted = kronbert.convert(teacher, rules=preset_like)
    assert linear_flops(converted, 5) == converted.kronecker_plan.linear_flops(5)
    assert linear_flops(teacher, 5) == converted.kronecker_plan.linear_flops(5, dense=True)


def test_bytes_are_those_of_the_saved_file(tmp_path):
    tied = BertForMaskedLM(bert_config())
    model = kronbert.convert(tied, rules={"bert.embeddings.word_embeddings": {"rank": 2}})
    model.cls.predictions.transform.half()
    for one in (tied, model):
        one.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors").values()
        figures = report(one, latency=False).student
        assert figures.bytes == sum(value.nbytes for value in stored)
    assert figures.bytes_by_dtype.keys() == {"float32", "float16"}
    assert figures.bytes_by_dtype["float16"] == 2 * (HIDDEN * HIDDEN + 3 * HIDDEN)


def test_errors_equal_the_plans_right_after_conversion(student, teacher):
    made = report(student, teacher, latency=False)
    planned = {layer.size.name: layer.error for layer in student.kronecker_plan.converted}
    assert len(planned) > 10
    assert made.errors == pytest.approx(planned, rel=1e-4, abs=1e-6)
    assert made.unmatched == ()


def test_errors_are_those_of_the_current_weights(student, teacher):
    name = "bert.encoder.layer.1.output.dense"
    before = student.get_submodule(name).a.detach().clone()
    with torch.no_grad():
        student.get_submodule(name).a.mul_(-1)
    errors, _ = weight_errors(student, teacher)
    weight = teacher.get_submodule(name).weight
    expected = (student.get_submodule(name).weight - weight).norm() / weight.norm()
    with torch.no_grad():
        student.get_submodule(name).a.copy_(before)
    assert errors[name] == pytest.approx(expected.item(), rel=1e-5)
    assert errors[name] > 1


def test_errors_find_their_layers_past_a_prefix(student, teacher):
    whole = weight_errors(student, teacher)[0]
    assert weight_errors(student, teacher.bert)[0] == whole
    body = weight_errors(student.bert, teacher)[0]
    assert {f"bert.{name}": error for name, error in body.items()} == whole


def test_errors_of_conv1d_are_those_of_the_transposed_weight():
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=24, n_layer=1, n_head=2)
    gpt = GPT2Model(config)
    converted = kronbert.convert(gpt, rules={"re:.*c_proj": {"rank": 3}})
    errors, unmatched = weight_errors(converted, gpt)
    planned = {layer.size.name: layer.error for layer in converted.kronecker_plan.converted}
    assert errors == pytest.approx(planned, rel=1e-4)
    assert not unmatched


def test_layers_the_teacher_lacks_are_named(student):
    wider = BertForSequenceClassification(bert_config(intermediate_size=192))
    made = report(student, wider, latency=False)
    assert "bert.encoder.layer.0.intermediate.dense" in made.unmatched
    assert "bert.encoder.layer.0.attention.self.query" in made.errors
    assert "Not compared" in made.to_markdown()


def test_layers_of_a_deeper_teacher_are_not_taken_for_those_of_one_number(student):
    deeper = BertForSequenceClassification(bert_config(num_hidden_layers=3))
    errors, unmatched = weight_errors(student, deeper)
    assert not any(".layer." in name for name in errors)
    assert "bert.encoder.layer.0.attention.self.query" in unmatched
    assert {"bert.embeddings.word_embeddings", "bert.pooler.dense"} <= errors.keys()


def test_a_student_from_disk_is_reported_without_its_plan(student, teacher, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    vars(loaded).pop("kronecker_plan", None)
    assert report(loaded, teacher, latency=False) == report(student, teacher, latency=False)


def test_a_dense_student_and_a_student_alone(student, teacher):
    dense = report(teacher, teacher, latency=False)
    assert dense.errors == {}
    assert dense.factor == 1
    alone = report(student, batch_sizes=(2,), sequence_length=8, seconds=0.02)
    assert alone.teacher is alone.factor is None
    assert alone.student.latency[2].median_ms > 0
    assert alone.latency_ratio == alone.errors == {}
    for text in (str(alone), alone.to_markdown()):
        assert f"{alone.student.parameters:,}" in text
        assert "teacher" not in text
    assert Report.from_json(json.loads(json.dumps(alone.to_json()))) == alone


def test_json_round_trip(timed):
    data = json.loads(json.dumps(timed.to_json(), allow_nan=False))
    assert Report.from_json(data) == timed
    assert data["schema"] == SCHEMA
    assert [row["batch_size"] for row in data["latency"]] == [1, 3]
    assert data["latency"][0]["ratio"] == timed.latency_ratio[1]
    assert data["student"]["bytes"] == timed.student.bytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 99}, "schema 99 is newer"),
        ({"eror": {}}, "unknown key 'eror'.*'errors'"),
        ({"errors": None}, "key 'errors' is missing"),
    ],
)
def test_json_of_another_shape_is_refused(timed, change, said):
    data = {**timed.to_json(), **change}
    data = {key: value for key, value in data.items() if value is not None}
    with pytest.raises(kronbert.KronbertError, match=said):
        Report.from_json(data)


def test_the_ratio_is_above_one_when_the_student_is_faster(student, teacher, monkeypatch):
    measured = {"teacher": Timing.of((6.0, 7.0)), "student": Timing.of((2.0, 2.0))}
    monkeypatch.setattr(reporting, "compare_models", lambda *args, **kwargs: measured)
    made = report(student, teacher, batch_sizes=(4,), sequence_length=8)
    assert made.latency_ratio == {4: 3.25}
    assert made.student.latency == {4: measured["student"]}


def test_every_form_shows_the_numbers(timed):
    for text in (str(timed), timed.to_markdown()):
        for number in (
            f"{timed.teacher.parameters:,}",
            f"{timed.student.parameters:,}",
            f"{timed.factor:.2f}",
            f"{timed.student.bytes / 2**20:.2f}",
            f"{timed.student.linear_flops / 1e6:,.1f}",
            f"{timed.student.latency[3].median_ms:.2f}",
            f"{timed.latency_ratio[3]:.2f}",
            f"{timed.errors['bert.pooler.dense']:.3f}",
            "input_ids (batch, 16)",
            f"torch {torch.__version__}",
        ):
            assert number in text
        assert "layer.*.attention.self.query" in text
    tables = [line for line in timed.to_markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {5}


def test_nothing_private_and_all_that_matters_is_in_the_environment(timed):
    found = timed.environment
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert found["kronbert"] == kronbert.__version__
    assert len(found["date"]) == len("2026-01-31")
    text = json.dumps(timed.to_json())
    assert socket.gethostname() not in text.replace("kronbert", "")
    assert str(Path.home()) not in text


def test_save_writes_text_json_and_picture(timed, tmp_path):
    timed.save(tmp_path / "new" / "folder")
    written = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert written == {"report.md", "report.json", "error_per_layer.png"}
    text = (tmp_path / "new/folder/report.md").read_text(encoding="utf-8")
    assert timed.to_markdown() in text
    assert "(error_per_layer.png)" in text
    stored = json.loads((tmp_path / "new/folder/report.json").read_text())
    assert Report.from_json(stored) == timed


def test_save_says_that_a_folder_cannot_be_written(timed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"cannot write there.*Give a folder"):
        timed.save(tmp_path / "file" / "below")


def test_the_models_are_left_as_they_were(student, teacher):
    state = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    student.bert.pooler.eval()
    report(student, teacher, batch_sizes=(1,), sequence_length=4, seconds=0.02)
    assert student.training
    assert not student.bert.pooler.training
    assert not teacher.training
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert not any(value.is_inference() for value in student.state_dict().values())


def test_inputs_come_from_the_seed_and_the_common_vocabulary(student, teacher):
    small = BertModel(bert_config(vocab_size=140))
    models = {"student": student, "teacher": small}
    first = latency.random_inputs(models, 30, 9, seed=1)
    again = latency.random_inputs(models, 30, 9, seed=1)
    other = latency.random_inputs(models, 30, 9, seed=2)
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert first["input_ids"].max() < 140
    assert first["attention_mask"].all()


def test_pictures_as_input():
    config = ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4,
                       intermediate_size=96, image_size=24, patch_size=8)  # fmt: skip
    vit = ViTModel(config)
    made = report(
        kronbert.convert(vit, factor=2).half(),
        vit,
        batch_sizes=(2,),
        sequence_length=10,
        seconds=0.02,
    )
    assert made.inputs == "pixel_values (batch, 3, 24, 24)"
    assert made.student.dtype == "float16"
    assert made.latency_ratio[2] > 0


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, sound):
        self.seen.append(tuple(sound.shape))
        return self.linear(sound)


def test_other_inputs_are_given_as_one_example():
    model = Odd()
    with pytest.raises(ReportError, match=r"the student, a Odd, takes inputs of unknown.*inputs="):
        report(model)
    model.main_input_name, model.config = "input_ids", SimpleNamespace()  # of several models, say
    with pytest.raises(ReportError, match="input_ids of a known vocabulary"):
        report(model)
    del model.main_input_name, model.config
    with pytest.raises(ReportError, match=r"'sound' has shape \(2, 6\), expected one example"):
        report(model, inputs={"sound": torch.zeros(2, 6)})
    with pytest.raises(ReportError, match=r"cannot run on sound \(1, 5\).*Pass an example"):
        report(model, inputs={"sound": torch.zeros(1, 5)})
    model.seen.clear()
    made = report(model, inputs={"sound": torch.zeros(1, 6)}, batch_sizes=(3,), seconds=0.02)
    assert set(model.seen) == {(3, 6)}
    assert made.inputs == "sound (batch, 6)"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_sizes": ()}, "expected whole numbers >= 1"),
        ({"batch_sizes": (0,)}, "expected whole numbers >= 1"),
        ({"sequence_length": 0}, "expected whole numbers >= 1"),
        ({"sequence_length": POSITIONS + 1}, "the models have 64 positions"),
        ({"seconds": 0.0}, "expected seconds > 0"),
    ],
)
def test_wrong_sizes_are_refused(student, teacher, wrong, said):
    with pytest.raises(ReportError, match=said):
        report(student, teacher, **{"sequence_length": 8, **wrong})
