"""The main job makes students of fewer layers than their teacher's."""

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import kronbert
from kronbert.errors import PlanError
from kronbert.job import compress
from kronbert.job_begin import hidden_error
from kronbert.job_depth import base_of
from kronbert.weight_errors import weight_errors
from tests.job_runs import settings_for, weights
from tests.small_berts import IDS, classifier

pytestmark = pytest.mark.usefixtures("one_thread", "hurried_report")


@pytest.fixture(scope="module")
def shallow(finished, tiny_task, tmp_path_factory):
    """(folder, report) of a run from the teacher that another one fine-tuned, to one layer."""
    folder = tmp_path_factory.mktemp("shallow") / "out"
    settings = settings_for(finished[0] / "teacher", tiny_task, folder, layers=1, epochs=2)
    return folder, compress(settings, lambda _: None)


def test_the_student_has_its_layers_and_its_size(shallow):
    folder, content = shallow
    student = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert student.config.num_hidden_layers == len(student.bert.encoder.layer) == 1
    assert 3.8 <= content["measured"]["factor"] <= 3.95
    assert content == json.loads((folder / "report.json").read_text())
    assert "Asked for: factor 3.8, 1 layers." in (folder / "report.md").read_text()
    assert {stage["objective"]["layer_map"] for name, stage in content["stages"].items()} == {
        "uniform"
    }
    assert list(content["hidden_errors"]) == ["fitted"]


def test_its_layer_is_held_against_the_one_whose_weights_it_has(shallow):
    folder, content = shallow
    load = AutoModelForSequenceClassification.from_pretrained
    student, teacher = load(folder / "student"), load(folder / "teacher")
    base = kronbert.fewer_layers(teacher, (2,))
    errors, unmatched = weight_errors(student, base)
    assert content["measured"]["errors"] == pytest.approx(errors)
    assert unmatched == ()
    assert "bert.encoder.layer.0.output.dense" in errors
    losses = [row["loss_ffn"] for row in content["history"]["intermediate"] if "loss_ffn" in row]
    assert losses[-1] < 0.8 * losses[0], "distillation taught nothing"


def test_stage_1_trains_a_masked_lm_of_fewer_layers(tiny_bert, tiny_task, tmp_path):
    masked, text, output = (tmp_path / name for name in ("masked", "text.txt", "out"))
    AutoModelForMaskedLM.from_pretrained(tiny_bert).save_pretrained(masked)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(masked)
    text.write_text("the soup was good and the room was cold here today\n" * 100)
    settings = settings_for(
        masked, tiny_task, output, layers=1, stage1_text=str(text), stage1_epochs=3, epochs=0.1
    )
    content = compress(settings, lambda _: None)
    logged = [row for row in content["history"]["stage1"] if "loss_mlm" in row]
    assert logged[-1]["loss_ffn"] < logged[0]["loss_ffn"]
    assert not any(".layer.1." in name for name in weights(output / "stage1"))


def test_factor_counts_against_the_teacher():
    teacher = classifier(num_hidden_layers=4)
    base, wanted = base_of(teacher, 2, {"factor": 4.0, "preset": None})
    asked = teacher.num_parameters() / 4
    assert base.config.num_hidden_layers == 2
    assert base.num_parameters() / wanted["factor"] == pytest.approx(asked)
    assert 0.9 * asked < kronbert.convert(base, **wanted).num_parameters() <= asked
    assert base_of(teacher, None, {"factor": 4.0}) == (teacher, {"factor": 4.0})
    base, wanted = base_of(teacher, 2, {"factor": None, "preset": "k8"})
    assert wanted == {"factor": None, "preset": "k8"}
    with pytest.raises(PlanError, match=r"layers=1 leave [\d,]+ parameters, 1\.1 times smaller"):
        base_of(teacher, 1, {"factor": 1.1})


def test_hidden_states_are_those_of_the_layers_that_are_learnt_from():
    teacher = classifier(num_hidden_layers=4).double()
    student = kronbert.fewer_layers(teacher, 2)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        mine, theirs = (m(IDS, output_hidden_states=True).hidden_states for m in (student, teacher))
    expected = sum(float((mine[i] - theirs[2 * i]).square().mean()) for i in (1, 2))
    assert hidden_error(student, teacher, [batch]) == pytest.approx(expected, rel=1e-4)


def test_what_is_refused(tiny_bert, tiny_task, tmp_path):
    with pytest.raises(PlanError, match="layers=3: expected 1 to 2"):
        compress(settings_for(tiny_bert, tiny_task, tmp_path / "out", layers=3), print)
    assert not (tmp_path / "out" / "state.json").exists()
