"""`kronbert pretrain-student`: what it saves, what it measures, and that a kill changes nothing."""

import json
import runpy
import shutil
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

import kronbert
from kronbert.distill import finetune
from kronbert.distill.sentences import check_pooling
from kronbert.errors import CheckpointError, DataError, DistillError, PlanError
from kronbert.pretrain import PretrainSettings, pretrain_student

SHORT = {"factor": 3.0, "epochs": 4, "learning_rate": 3e-3, "batch_size": 8, "max_length": 16,
         "precision": "fp32", "init": "weights"}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def texts(tiny_task, tmp_path_factory):
    """(text, held-out text): the sentences of the task's two files."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("train", "dev"):
        rows = (tiny_task / f"{name}.tsv").read_text().splitlines()[1:]
        (folder / f"{name}.txt").write_text("\n".join(row.split("\t")[0] for row in rows) + "\n")
    return folder / "train.txt", folder / "dev.txt"


def settings_for(model, texts, output, **changes):
    given = {"model": str(model), "text": str(texts[0]), "valid": str(texts[1])}
    return PretrainSettings(**given | {"output": str(output)} | SHORT | changes)


@pytest.fixture(scope="module")
def finished(tiny_bert, texts, tmp_path_factory, one_thread):
    """(folder, settings, report, what was said) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("pretrain") / "whole"
    settings = settings_for(tiny_bert, texts, folder, teacher_name="someone/tiny-bert")
    said = []
    return folder, settings, pretrain_student(settings, said.append), said


@pytest.fixture(scope="module")
def masked(tiny_bert, tmp_path_factory):
    """The same encoder, saved with a masked-LM head."""
    folder = tmp_path_factory.mktemp("masked") / "masked"
    torch.manual_seed(4)
    AutoModelForMaskedLM.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


def test_the_student_loads_and_learnt(finished, tiny_bert):
    folder, _, report, said = finished
    student = kronbert.load(folder / "student")
    by_auto = AutoModel.from_pretrained(folder / "student")
    assert type(student) is type(by_auto)
    for name, value in by_auto.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name
    assert report["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    teacher = AutoModel.from_pretrained(tiny_bert)
    assert report["teacher"]["parameters"] == sum(p.numel() for p in teacher.parameters())
    start, end = report["held_out"]["start"], report["held_out"]["end"]
    assert set(start) == {"step", "loss_embedding", "loss_ffn"}
    assert end["loss_ffn"] < 0.8 * start["loss_ffn"]
    assert any(line.startswith("step 0 of ") for line in said)
    fresh = kronbert.convert(teacher, factor=3.0).state_dict()
    # The pooler is converted, and no term reads it.
    for name in (n for n in fresh if n.startswith("pooler.")):
        assert torch.equal(fresh[name], student.state_dict()[name]), name


def test_a_student_fitted_to_the_text_starts_nearer(finished, texts, tiny_bert, tmp_path):
    _, settings, report, _ = finished
    fitted = replace(settings, output=str(tmp_path), init="data", epochs=0.1)
    start = pretrain_student(fitted, lambda _: None)["held_out"]["start"]
    assert start["loss_ffn"] < 0.9 * report["held_out"]["start"]["loss_ffn"]


def test_curve_and_report(finished, texts, tiny_bert):
    folder, settings, report, _ = finished
    assert report == json.loads((folder / "report.json").read_text())
    assert report == json.loads((folder / "student" / "report.json").read_text())
    points = json.loads((folder / "curve.json").read_text())["points"]
    steps = report["steps"]
    every = -(-steps // 10)
    assert [p["step"] for p in points] == [*range(0, steps, every), steps]
    assert imread(folder / "curve.png").shape[1] == 1100
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    words = texts[0].read_text().split()
    blocks = len(tokenizer(words, is_split_into_words=True)["input_ids"]) // 14
    assert steps == 4 * -(-blocks // 8)
    assert report["tokens"] == 4 * blocks * 16  # the last batch of a pass is a smaller one
    assert 0 < report["tokens_per_second"]
    trained = report["seconds"] - report["held_out_seconds"]
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / trained, rel=0.02)
    assert report["versions"]["torch"] == torch.__version__
    text = json.dumps(report)
    assert str(texts[0].parent) not in text
    assert str(tiny_bert.parent) not in text
    assert report["settings"]["text"] == "train.txt"
    assert not list(folder.glob("*-run"))
    again = []
    assert pretrain_student(settings, again.append) == report
    assert again == [f"finished before: {folder / 'report.json'} (the text was not read again)"]


def test_model_card_has_the_reports_numbers(finished):
    folder, _, report, _ = finished
    card = (folder / "student" / "README.md").read_text()
    assert "base_model: someone/tiny-bert" in card
    assert f"{report['student']['parameters']:,} parameters" in card
    for key in ("loss_embedding", "loss_ffn"):
        start, end = (report["held_out"][when][key] for when in ("start", "end"))
        assert f"| {key.removeprefix('loss_')} | {start:.4g} | {end:.4g} |" in card
    assert "license" not in card


class _Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_killed_run_resumes_to_the_same_student(finished, texts, tmp_path, monkeypatch):
    whole, settings, report, _ = finished
    settings = replace(settings, output=str(tmp_path / "killed"))
    real = finetune._StageTrainer.train

    def train(self, *args, **kwargs):
        self.add_callback(_Interrupt(report["steps"] // 2))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(finetune._StageTrainer, "train", train)
        with pytest.raises(KeyboardInterrupt):
            pretrain_student(settings, lambda _: None)
    with pytest.raises(CheckpointError, match=r"other settings \(seed 42 -> 7\)"):
        pretrain_student(replace(settings, seed=7), lambda _: None)
    said = []
    again = pretrain_student(settings, said.append)
    assert any(line.startswith("resumed after step") for line in said)
    expected = load_file(whole / "student" / "model.safetensors")
    found = load_file(tmp_path / "killed" / "student" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    curves = [
        json.loads((folder / "curve.json").read_text())["points"]
        for folder in (whole, tmp_path / "killed")
    ]
    assert curves[0] == curves[1]
    last = report["steps"] - again["steps"] // 2
    assert again["tokens"] == report["tokens"]
    rate = again["tokens_per_second"] * (again["seconds"] - again["held_out_seconds"]) / (8 * 16)
    assert last <= round(rate) < again["steps"]  # the speed is that of the steps done since


def test_masked_words_are_the_same_after_a_kill(masked, texts, tmp_path, monkeypatch):
    given = {"factor": 2.5, "epochs": 2}
    settings = [settings_for(masked, texts, tmp_path / name, **given) for name in "ab"]
    steps = pretrain_student(settings[0], lambda _: None)["steps"]
    real = finetune._StageTrainer.train

    def train(self, *args, **kwargs):
        self.add_callback(_Interrupt(steps // 2))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(finetune._StageTrainer, "train", train)
        with pytest.raises(KeyboardInterrupt):
            pretrain_student(settings[1], lambda _: None)
    pretrain_student(settings[1], lambda _: None)
    whole, found = (load_file(tmp_path / name / "student/model.safetensors") for name in "ab")
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_report_that_is_gone_is_written_again(tiny_bert, texts, tmp_path):
    dev = shutil.copy(texts[1], tmp_path / "dev.txt")
    settings = settings_for(tiny_bert, (texts[0], dev), tmp_path / "out", epochs=0.2)
    report = pretrain_student(settings, lambda _: None)
    (tmp_path / "out" / "report.json").unlink()
    said = []
    assert pretrain_student(settings, said.append) == report
    assert any(line.endswith("done before") for line in said)
    (tmp_path / "out" / "report.json").unlink()
    dev.write_text("\n".join(reversed(dev.read_text().splitlines())))
    with pytest.raises(CheckpointError, match="began with another text in valid"):
        pretrain_student(settings, lambda _: None)


def test_one_process_at_a_time(tiny_bert, texts, tmp_path):
    settings = settings_for(tiny_bert, texts, tmp_path / "held")
    (tmp_path / "held").mkdir()
    with (
        FileLock(tmp_path / "held" / ".lock"),
        pytest.raises(CheckpointError, match="another process is at work"),
    ):
        pretrain_student(settings, print)
    assert [one.name for one in (tmp_path / "held").iterdir()] == [".lock"]


def test_adamw_alone_takes_other_steps(finished, texts, tmp_path):
    folder, settings, report, _ = finished
    plain = pretrain_student(
        replace(settings, output=str(tmp_path), optimizer="adamw"), lambda _: None
    )
    assert (report["stage"]["muon_rate"], plain["stage"]["muon_rate"]) == (2.0, None)
    muon, adamw = (load_file(path / "student/model.safetensors") for path in (folder, tmp_path))
    dense = "encoder.layer.0.output.dense.a"
    assert float((muon[dense] - adamw[dense]).abs().max()) > 1e-3


def test_measuring_changes_no_weight(finished, texts, tmp_path):
    whole, settings, _, _ = finished
    content = pretrain_student(
        replace(settings, valid=None, output=str(tmp_path / "out")), lambda _: None
    )
    assert content["held_out"] is None
    assert not (tmp_path / "out" / "curve.json").exists()
    expected = load_file(whole / "student" / "model.safetensors")
    found = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_masked_lm_head_is_trained_and_half_loads_as_float32(masked, texts, tmp_path):
    output = tmp_path / "out"
    settings = settings_for(
        masked, texts, output, half=True, factor=2.5, valid_blocks=50, epochs=12
    )
    content = pretrain_student(settings, lambda _: None)
    start, end = content["held_out"]["start"], content["held_out"]["end"]
    assert end["loss_mlm"] < 0.9 * start["loss_mlm"]
    stored = load_file(output / "student" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    for student in (
        kronbert.load(output / "student"),
        AutoModel.from_pretrained(output / "student"),
        AutoModelForMaskedLM.from_pretrained(output / "student", dtype="auto"),
    ):
        assert {value.dtype for value in student.parameters()} == {torch.float32}
        assert student.config.dtype is torch.float32
    assert content["student"]["class"] == "BertForMaskedLM"
    assert json.loads((output / "curve.json").read_text())["data"].endswith("50 held out")


def test_a_head_that_only_the_config_names(tiny_bert, texts, tmp_path):
    """As sentence encoders are saved: no word is masked, for want of weights to answer with."""
    model = shutil.copytree(tiny_bert, tmp_path / "encoder")
    config = AutoModel.from_pretrained(model).config
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(model)
    asked = settings_for(model, texts, tmp_path / "out", epochs=0.5, valid=None)
    content = pretrain_student(asked)
    assert not content["settings"]["mlm"]
    taps = [term["tap"] for term in content["stage"]["objective"]["terms"]]
    assert taps == ["embedding", "ffn"]
    assert type(kronbert.load(tmp_path / "out" / "student")).__name__ == "BertModel"
    with pytest.raises(DistillError, match="has no masked-LM head"):
        pretrain_student(settings_for(model, texts, tmp_path / "b", mlm=True))


def test_going_on_from_a_student(finished, texts, tmp_path):
    whole, settings, report, _ = finished
    more = replace(
        settings, student=str(whole / "student"), factor=None, output=str(tmp_path / "out")
    )
    content = pretrain_student(more, lambda _: None)
    start, before = content["held_out"]["start"], report["held_out"]["end"]
    assert start["loss_ffn"] == pytest.approx(before["loss_ffn"], rel=1e-5)
    assert content["student"]["factor"] == report["student"]["factor"]
    assert content["asked"] == {"factor": 3.0, "preset": None}
    assert str(whole) not in json.dumps(content)


def test_a_student_of_fewer_layers(finished, texts, tiny_bert, tmp_path):
    """Its size counts against the model; its layer learns from the one whose weights it has, in a
    run that goes on from it too; the card says its depth, and the report."""
    output = tmp_path / "shallow"
    report = pretrain_student(settings_for(tiny_bert, texts, output, layers=1), lambda _: None)
    student, teacher = kronbert.load(output / "student"), AutoModel.from_pretrained(tiny_bert)
    assert student.config.num_hidden_layers == report["student"]["layers"] == 1
    asked = teacher.num_parameters() / 3
    assert 0.95 * asked < student.num_parameters() <= asked
    assert report["student"]["factor"] == teacher.num_parameters() / student.num_parameters()
    start, end = report["held_out"]["start"], report["held_out"]["end"]
    assert end["loss_ffn"] < 0.8 * start["loss_ffn"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    lines = " ".join(texts[1].read_text().splitlines()[:30])
    ids = tokenizer(lines, return_tensors="pt", max_length=16, truncation=True)["input_ids"]
    with torch.no_grad():
        mine, theirs = (m.eval()(ids, output_hidden_states=True) for m in (student, teacher))
    gaps = [float((mine[0] - hidden).square().mean()) for hidden in theirs.hidden_states[1:]]
    assert gaps[1] < 0.5 * gaps[0]
    assert " parameters for the teacher's " in (output / "student/README.md").read_text()
    assert ", in 1 layers for its 2; its weights" in (output / "student/README.md").read_text()
    whole = (finished[0] / "student/README.md").read_text()
    assert f"{finished[2]['teacher']['parameters']:,}; its weights" in whole
    going_on = settings_for(
        tiny_bert, texts, tmp_path / "on", student=str(output / "student"), factor=None, epochs=2
    )
    more = pretrain_student(going_on, lambda _: None)
    assert more["held_out"]["start"]["loss_ffn"] == pytest.approx(end["loss_ffn"], rel=1e-5)
    assert more["held_out"]["end"]["loss_ffn"] < end["loss_ffn"]
    assert more["student"]["factor"] == report["student"]["factor"]


def test_a_student_of_another_base_is_refused(finished, tiny_bert, tmp_path):
    whole, settings, _, _ = finished
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    model = AutoModel.from_pretrained(other)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.flip(0))
    model.save_pretrained(other)
    asked = {"model": str(other), "student": str(whole / "student"), "factor": None}
    with pytest.raises(DistillError, match=r"student=.*: its teacher's word embeddings differ"):
        pretrain_student(replace(settings, output=str(tmp_path / "out"), **asked), lambda _: None)


def test_a_student_that_was_removed_is_not_finished(texts, tiny_bert, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    settings = replace(finished[1], output=str(folder))
    shutil.rmtree(folder / "student")
    with pytest.raises(CheckpointError, match="student/, which this run made, is gone"):
        pretrain_student(settings, lambda _: None)


def test_sentences_point_where_the_teachers_do(finished, texts, tiny_bert, tmp_path):
    whole, settings, before, _ = finished
    student = str(whole / "student")
    asked = {"student": student, "factor": None, "sentences": True, "learning_rate": 1e-2}
    more = replace(settings, output=str(tmp_path / "out"), **asked)
    report = pretrain_student(more, lambda _: None)
    start, end = report["held_out"]["start"], report["held_out"]["end"]
    assert end["loss_sentence"] < 0.7 * start["loss_sentence"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = [line for line in texts[0].read_text().splitlines() if len(line.split()) > 3]
    lengths = [len(ids[:16]) for ids in tokenizer(rows)["input_ids"]]
    assert report["data"].startswith(f"{len(rows)} sentences of at most 16 tokens")
    assert report["steps"] == 4 * -(-len(rows) // 8)
    mean = sum(lengths) / len(rows)
    assert report["tokens"] == round(report["steps"] * 8 * mean)
    assert report["before"]["steps"] == before["steps"]
    assert "history" not in report["before"]
    card = (tmp_path / "out/student/README.md").read_text()
    assert f"| before | {before['steps']:,} steps of 8 blocks, {before['tokens']:,} tokens" in card
    usage = card.split("```python")[1].split("```")[0]
    usage = usage.replace("this folder or its hub name", str(tmp_path / "out/student"))
    (tmp_path / "usage.py").write_text(usage.replace("A sentence.", rows[0]))
    found = runpy.run_path(str(tmp_path / "usage.py"))
    teacher = AutoModel.from_pretrained(tiny_bert).eval()
    theirs = teacher(**found["batch"]).last_hidden_state.mean(1)
    cosine = torch.cosine_similarity(found["embeddings"], theirs)
    assert cosine > 1 - 3 * end["loss_sentence"]


def test_a_first_student_may_begin_with_sentences(tiny_bert, texts, tmp_path):
    asked = {"sentences": True, "init": "data", "epochs": 0.1}
    report = pretrain_student(settings_for(tiny_bert, texts, tmp_path / "out", **asked))
    assert report["before"] is None
    weights = settings_for(tiny_bert, texts, tmp_path / "b", **(asked | {"init": "weights"}))
    other = pretrain_student(weights)
    first, second = (one["held_out"]["start"]["loss_ffn"] for one in (report, other))
    assert first < 0.9 * second


def test_another_pooling_is_refused(tiny_bert, texts, tmp_path):
    model = shutil.copytree(tiny_bert, tmp_path / "encoder")
    (model / "1_Pooling").mkdir()
    told = model / "1_Pooling/config.json"
    told.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    asked = settings_for(model, texts, tmp_path / "out", sentences=True)
    with pytest.raises(DistillError, match="its sentence embedding is pooling_mode_cls_token"):
        pretrain_student(asked)
    for mean in ('{"pooling_mode_mean_tokens": true}', '{"pooling_mode": "mean"}'):
        told.write_text(mean)
        check_pooling(str(model))
    check_pooling(str(tiny_bert))
    check_pooling("someone/not-here")


def test_what_does_not_go_together(masked, tiny_bert, finished, texts, tmp_path):
    with pytest.raises(PlanError, match="expected factor=, preset=, rules= or student="):
        settings_for(tiny_bert, texts, tmp_path, factor=None)
    with pytest.raises(PlanError, match="student= has its layers and shapes"):
        settings_for(tiny_bert, texts, tmp_path, student="x")
    with pytest.raises(PlanError, match="student= has its layers and shapes"):
        settings_for(tiny_bert, texts, tmp_path, student="x", factor=None, layers=1)
    with pytest.raises(PlanError, match="layers=3: expected 1 to 2"):
        pretrain_student(settings_for(tiny_bert, texts, tmp_path / "e", layers=3))
    with pytest.raises(PlanError, match="expected one of them"):
        settings_for(tiny_bert, texts, tmp_path, preset="k8")
    with pytest.raises(DistillError, match="optimizer='sgd': expected 'adamw' or 'muon'"):
        settings_for(tiny_bert, texts, tmp_path, optimizer="sgd")
    with pytest.raises(DistillError, match="sentences= and mlm=: no word of a sentence is masked"):
        settings_for(tiny_bert, texts, tmp_path, sentences=True, mlm=True)
    with pytest.raises(DistillError, match="has no masked-LM head"):
        pretrain_student(settings_for(tiny_bert, texts, tmp_path / "a", mlm=True))
    with pytest.raises(DataError, match="takes 64 tokens at most"):
        pretrain_student(settings_for(tiny_bert, texts, tmp_path / "b", max_length=65))
    with pytest.raises(PlanError, match=r"pretrain-student\(valid_blocks=0\): expected 1 or more"):
        settings_for(tiny_bert, texts, tmp_path, valid_blocks=0)
    student = str(finished[0] / "student")
    with pytest.raises(DistillError, match="a BertModel, but its teacher would be a BertForMasked"):
        pretrain_student(settings_for(masked, texts, tmp_path / "d", student=student, factor=None))
    assert not list(tmp_path.glob("*/student"))
