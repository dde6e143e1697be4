"""What a run of the GLUE study learns from and goes on from: rows, tasks, runs, general text."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from kronbert.distill import load_task
from kronbert.errors import DataError, DistillError
from kronbert.job_models import open_model
from tests.small_study import LAST, SMALL, made


def test_several_stages_text_cache_and_copies(modules, options, counted, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["The soup was good. The room was dull. The film was fine."] * 20))
    options.text = str(text)
    soft = {**modules.settings.stages_of("sst2")[-1], "epochs": 1, "batch_size": 16}
    hidden = {**soft, "name": "hidden", "objective": {"terms": [{"tap": "ffn"}]}}
    soft["objective"] = {"terms": [{"tap": "logits"}]}
    soft["cache_teacher"] = True
    hard = {**hidden, "name": "hard", "objective": {"terms": [{"tap": "labels"}]}}  # no bare rows
    told = {**SMALL, "stages": [hidden, soft, hard], "augment": 2, "text_rows": 12,
            "transfer": {"mnli": 7}, "calibration_text": 10, "splice": 9}  # fmt: skip
    told = {k: v for k, v in told.items() if k not in ("epochs", "batch_size")}
    Path(options.stage).write_text(json.dumps(told))
    row = made(modules, options)["kronbert"]
    assert counted == ["teacher", "hidden", "task", "hard"]
    assert row["rows"] > 64 + 12 + 64 + 7 + 9
    assert row["data"].endswith(f"; {row['rows'] - 64} rows without a label")
    assert "rows without a label" in row["data"]
    assert {step["stage"] for step in row["history"]} == {"hidden", "task", "hard"}
    assert len(list((Path(options.output) / "sst2/teacher-outputs").glob("*.npy"))) == 1


def test_teacher_and_student_go_on_from_another_task(modules, options, monkeypatch):
    options.tasks = ["mnli"]
    row = made(modules, options)["kronbert"]
    assert row["subset"]
    assert modules.settings.is_subset(row["data"])
    monkeypatch.setitem(modules.settings.TEACHERS, "sst2", {"start": "mnli", "epochs": 0.001})
    Path(options.stage).write_text(json.dumps({**SMALL, "epochs": 0.001, "start": "mnli"}))
    options.tasks, options.only_missing = ["sst2"], True
    row = made(modules, options)
    assert row["teacher"]["start"] == "mnli"
    assert row["kronbert"]["start"] == {"name": "student of mnli"}
    root = Path(options.output)
    for kind in ("teacher", "main/kronbert-3-seed1"):
        one = open_model(str(root / "mnli" / kind / "model")).float()
        two = open_model(str(root / "sst2" / kind / "model")).float()
        for name, value in two.base_model.named_parameters():  # one step at a vanishing rate
            other = dict(one.base_model.named_parameters())[name]
            torch.testing.assert_close(value, other, atol=5e-3, rtol=0)
    options.seeds = [2]
    with pytest.raises(DistillError, match=r"goes on from mnli: kronbert.*not there"):
        made(modules, options)


def test_mnli_s_teacher_learns_from_snli_as_well(modules, options, glue):
    options.tasks, options.students, options.snli_dir = ["mnli"], [], str(glue / "snli")
    row = made(modules, options)["teacher"]
    assert row["rows"] == 36 + 21
    assert row["data"].endswith("dev_mismatched.tsv; snli/train.tsv")
    assert row["asked"]["snli"] is True
    rows = modules.runs.Study(options).rows
    train, own = rows.of_teacher("mnli").train, rows.tokens("mnli").train
    assert train[:36] == own[:36]  # and classes by their names, which SNLI's file sorts otherwise
    assert train["labels"][36:] == [(2, 0, 1)[i % 3] for i in range(21)]
    assert len(rows.of_teacher("sst2").train) == 64
    options.snli_dir = None
    with pytest.raises(DistillError, match=r"made with other settings \(snli\)"):
        made(modules, options)
    options.snli_dir = str(glue / "glue/sst2")
    with pytest.raises(DataError, match="premise"):
        rows.of_teacher("mnli")


def test_a_result_of_other_rows_is_not_taken(modules, options, glue, tmp_path):
    options.tasks, options.students = ["sst2"], []
    known = made(modules, options)["teacher"]
    assert made(modules, options)["teacher"] == known
    folder = shutil.copytree(glue / "glue", tmp_path / "other")
    (train,) = (folder / "sst2").glob("train*")
    lines = train.read_text().splitlines()
    train.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    options.data_dir = str(folder)
    with pytest.raises(DistillError, match=r"made with other settings \(data_digest\)"):
        made(modules, options)


def test_rows_of_other_classes_are_refused(modules, options, glue, tmp_path):
    data = modules.data.Rows(options, None)
    mnli = load_task("mnli", data_dir=data.options.data_dir)
    for name in ("train", "dev"):
        lines = (glue / "snli" / f"{name}.tsv").read_text()
        (tmp_path / f"{name}.tsv").write_text(lines.replace("neutral", "unclear"))
    with pytest.raises(DataError, match=r"labels \['unclear'\], but 'mnli' has \('entailment'"):
        modules.data.with_labelled(mnli, str(tmp_path))


def test_a_student_whose_outputs_count_by_importance(modules, options):
    """Of the same shapes and tables as one fitted to data; its layers are others."""
    seen = []

    def begun(init):
        options.tag = init
        Path(options.stage).write_text(json.dumps({**SMALL, "init": init}))
        study = modules.runs.Study(options)
        (run,) = modules.main.runs_of(options)[1:]
        training = modules.settings.training_of("sst2", study.changes)
        teacher = open_model(str(study.teacher_folder("sst2"))).float()
        student, _ = study.begin(run, teacher, training, study.rows.tokens("sst2", training))
        seen.append(made(modules, options)["kronbert"])
        return student.state_dict()

    plain, counted = begun("data"), begun("importance")
    assert [row["init"] for row in seen] == ["data", "importance"]
    differ = {name for name in plain if not torch.equal(plain[name], counted[name])}
    assert any(".layer.0.output.dense" in name for name in differ)
    assert not any("embeddings" in name for name in differ)
    with pytest.raises(DistillError, match="init='fisher': expected one of data, weights, imp"):
        modules.settings.training_of("sst2", {"init": "fisher"})


def test_a_variant_of_the_last_stage_goes_on_from_before_it(modules, options, counted):
    """Bit for bit."""
    hidden = {**LAST, "name": "hidden", "objective": {"terms": [{"tap": "ffn"}]}, "batch_size": 16}
    told = {**SMALL, "stages": [{**hidden, "epochs": 1}, LAST], "init": "data"}
    folder = Path(options.output) / "sst2/main/kronbert-3-seed1"

    def variant(tag, **changes):
        options.tag = tag
        Path(options.stage).write_text(json.dumps({**told, **changes}))
        return made(modules, options)

    main = variant("main")["kronbert"]
    again = variant("again", after="main")["kronbert"]
    assert counted == ["teacher", "hidden", "task", "task"]
    for key in ("scores", "stages", "init"):
        assert again[key] == main[key]
    losses = [[row["eval_loss"] for row in made["history"]] for made in (main, again)]
    assert losses[1] == losses[0][-len(losses[1]) :]
    weights = [path.joinpath("kronbert-3-seed1/model/model.safetensors").read_bytes()
               for path in (folder.parent, folder.parents[1] / "again")]  # fmt: skip
    assert weights[0] == weights[1]
    with pytest.raises(DistillError, match=r"after='main', but .* made otherwise .*\(init\)"):
        variant("other", after="main", init="weights")
    (folder / "result.json").write_text(json.dumps({**main, "teacher_digest": "another"}))
    with pytest.raises(DistillError, match=r"made otherwise before its last stage \(teacher\)"):
        variant("of-another-teacher", after="main")
    options.students = ["svd"]
    assert variant("main")["svd"]["init"] == "weights"
    assert variant("again", after="main")["svd"]["init"] == "weights"
    options.students = ["kronbert"]
    options.seeds = [2]
    with pytest.raises(DistillError, match=r"seed 2 before its last stage, which is not there"):
        variant("absent", after="main")
    for wrong in ({"stages": [LAST]}, {"rates": [1e-3, 1e-4]}):
        with pytest.raises(DistillError, match=r"after='main': expected two stages or more"):
            modules.settings.training_of("sst2", {"after": "main", **wrong})


def test_stage1_students_are_found_by_their_factor(modules, options, tiny_bert, tmp_path):
    from kronbert.pretrain import PretrainSettings, pretrain_student

    text = tmp_path / "text.txt"
    text.write_text("\n".join(["the soup was good and the room was dull"] * 200))
    place = tmp_path / "stage1" / "3"
    pretrain_student(
        PretrainSettings(model=str(tiny_bert), text=str(text), output=str(place), factor=3.0,
                         max_length=16, epochs=1),
        say=lambda line: None,
    )  # fmt: skip
    options.stage1, options.students = str(tmp_path / "stage1"), ["kronbert", "kronbert-stage1"]
    rows = made(modules, options)
    assert rows["kronbert-stage1"]["start"]["name"]
    assert rows["kronbert"]["start"] is None
    sizes = [rows[kind]["parameters"] for kind in options.students]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    options.students = ["svd-stage1"]
    with pytest.raises(DistillError, match=r"expected 3-svd in --stage1"):
        made(modules, options)
    shutil.copytree(place, tmp_path / "stage1" / "3-svd")
    rows = made(modules, options)
    assert rows["svd-stage1"]["start"]["name"]
    options.students = ["kronbert-stage1"]
    options.stage1 = str(tmp_path / "absent")
    options.seeds = [2]
    with pytest.raises(DistillError, match=r"DataError: .*expected 3 in --stage1, got .*absent"):
        made(modules, options)
