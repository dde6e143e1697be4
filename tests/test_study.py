"""The GLUE study on a tiny BERT: its runs, skipping, resuming, locks, collecting."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from kronbert.distill import load_task
from kronbert.distill.finetune import use_bf16
from kronbert.distill.recipes.kronbert import task_stages
from kronbert.errors import DataError, DistillError
from kronbert.job_models import open_model

LAST = {k: v for k, v in task_stages("sst2")[-1].to_dict().items() if k != "seed"}
SCORED = ("scores", "fidelity", "retention_error", "outside")
SMALL = {"stages": [LAST], "epochs": 1, "batch_size": 16, "rates": [1e-3],
         "calibration_rows": 32, "splice": 0}  # fmt: skip


@pytest.fixture
def options(tiny_bert, glue, tmp_path, modules, monkeypatch):
    monkeypatch.setitem(modules.settings.TEACHER, "epochs", 1)
    monkeypatch.setattr(modules.settings, "FULL", ("sst2",))
    changes = tmp_path / "stage.json"
    changes.write_text(json.dumps(SMALL))
    words = ["--model", tiny_bert, "--data-dir", glue / "glue", "--output", tmp_path / "out"]
    words += ["--tasks", "sst2", "--factors", 3, "--seeds", 1, "--students", "kronbert"]
    words += ["--stage", changes, "--tag", "main", "--stage1", "none"]
    return modules.main.parser().parse_args([str(word) for word in words])


def made(modules, options):
    """The results of all runs, by kind."""
    study = modules.runs.Study(options)
    runs = modules.main.runs_of(options)
    failed = modules.main.work(study, runs)
    if failed:
        raise DistillError(failed[0])
    return {run.kind: json.loads((run.folder(study.output) / "result.json").read_text())
            for run in runs}  # fmt: skip


@pytest.fixture
def counted(modules, monkeypatch):
    """Every stage that is trained: its name."""
    seen = []
    real = modules.runs.run_stage

    def counting(student, teacher, stage, *rest, **more):
        seen.append(stage.name)
        return real(student, teacher, stage, *rest, **more)

    monkeypatch.setattr(modules.runs, "run_stage", counting)
    return seen


def test_a_run_is_made_once_and_says_where_it_comes_from(modules, options, glue, counted):
    options.ood_dir, options.ood_limit = str(glue / "ood"), 10
    options.students = ["kronbert", "svd"]
    rows = made(modules, options)
    assert counted == ["teacher", "task", "task"]
    row = rows["kronbert"]
    assert row["init"] == "data"
    assert rows["svd"]["init"] == "weights"
    assert row["measured_factor"] == row["teacher_parameters"] / row["parameters"]
    assert row["stages"][0]["epochs"] == 1
    assert row["stages"][0]["seed"] == row["seed"] == 1
    assert row["outside"].keys() == {"imdb"}
    assert row["outside_data"] == "imdb/test.tsv; 10 of 20 rows, evenly spaced"
    assert row["data"] == "sst2/train.tsv, dev.tsv"
    assert not row["subset"]
    assert not row["resumed"]
    assert row["precision"] == ("bf16" if use_bf16("auto") else "fp32")
    assert len(row["history"]) >= 4
    folder = Path(options.output) / "sst2/main/kronbert-3-seed1"
    assert not (folder / "run").exists()
    assert open_model(str(folder / "model")).kronecker_plan.factor > 2.9
    made(modules, options)
    assert counted == ["teacher", "task", "task"]
    (folder / "result.json").unlink()
    made(modules, options)
    assert counted == ["teacher", "task", "task", "task"]


def test_scores_are_those_of_the_saved_model_and_can_be_made_again(modules, options, glue):
    options.ood_dir = str(glue / "ood")
    rows = made(modules, options)
    assert "fidelity" not in rows["teacher"]
    agreed = rows["kronbert"]["fidelity"]["validation"]
    assert 0 <= agreed["agreement"] <= 1
    assert agreed["kl"] > 0 <= rows["kronbert"]["retention_error"] < 1
    study = modules.runs.Study(options)
    for run in modules.main.runs_of(options):
        path = run.folder(study.output) / "result.json"
        before = json.loads(path.read_text())
        found = {key: before.pop(key) for key in SCORED if key in before}
        path.write_text(json.dumps({**before, "scores": {}}))
        again = study.score_again(run)
        assert again == json.loads(path.read_text())
        assert {key: again[key] for key in found} == found
        assert {key: again[key] for key in before} == before
        assert again["scored_at"]
    shutil.rmtree(path.parent / "model")
    with pytest.raises(DistillError, match=r"no model beside it.*--no-models"):
        study.score_again(run)


def test_a_result_of_other_settings_is_refused_or_kept(modules, options, counted):
    made(modules, options)
    Path(options.stage).write_text(json.dumps({**SMALL, "epochs": 2}))
    with pytest.raises(DistillError, match=r"other settings \(training, changes\).*--tag"):
        made(modules, options)
    options.only_missing = True
    made(modules, options)
    assert counted == ["teacher", "task"]


def test_a_result_from_before_a_setting_existed_counts(modules, options, counted):
    made(modules, options)
    path = Path(options.output) / "sst2/main/kronbert-3-seed1/result.json"
    told = json.loads(path.read_text())
    del told["asked"]["training"]["structure"]
    path.write_text(json.dumps(told))
    made(modules, options)
    assert counted == ["teacher", "task"]
    Path(options.stage).write_text(json.dumps({**SMALL, "structure": "svd"}))
    with pytest.raises(DistillError, match=r"other settings \(training, changes\)"):
        made(modules, options)


def test_a_killed_run_goes_on_to_the_same_scores(modules, options, monkeypatch):
    whole = made(modules, options)["kronbert"]
    folder = Path(options.output) / "sst2/main/kronbert-3-seed1"
    trained = open_model(str(folder / "model")).state_dict()
    shutil.rmtree(folder)
    from kronbert.distill.finetune import _StageTrainer

    real = _StageTrainer.training_step

    def dying(self, *rest, **more):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(_StageTrainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            made(modules, options)
    assert list((folder / "run/task").glob("checkpoint-*"))
    assert not (folder / "result.json").exists()
    steps = []

    def counting(self, *rest, **more):
        steps.append(self.state.global_step)
        return real(self, *rest, **more)

    monkeypatch.setattr(_StageTrainer, "training_step", counting)
    row = made(modules, options)["kronbert"]
    assert steps == [3]
    assert row["resumed"]
    assert row["scores"] == whole["scores"]
    for name, value in open_model(str(folder / "model")).state_dict().items():
        torch.testing.assert_close(value, trained[name])


def test_a_locked_run_is_left_to_its_process(modules, options, counted, capsys, monkeypatch):
    monkeypatch.setattr(modules.main, "PATIENCE", 0.0)
    study = modules.runs.Study(options)
    teacher, run = modules.main.runs_of(options)
    study.make(teacher)
    folder = run.folder(study.output)
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        modules.main.work(study, [run])
    assert counted == ["teacher"]
    assert "being worked on by another process" in capsys.readouterr().out
    rates = {**SMALL, "rates": [1e-4, 1e-3]}
    Path(options.stage).write_text(json.dumps(rates))
    study = modules.runs.Study(options)
    place = run.rates_folder(study.output)
    place.mkdir(parents=True)
    lock, slept = FileLock(place / ".lock"), []

    def sleep(seconds):
        slept.append(seconds)
        lock.release()

    monkeypatch.setattr(modules.main.time, "sleep", sleep)
    lock.acquire()
    modules.main.work(study, [run])  # waits for the rates, then trains
    assert slept == [0.0]
    row = json.loads((folder / "result.json").read_text())
    assert [one["learning_rate"] for one in row["search"]["results"]] == [1e-4, 1e-3]
    assert row["stages"][-1]["learning_rate"] == row["search"]["learning_rate"]
    before = list(counted)
    options.seeds = [1, 2]
    made(modules, options)  # another seed, the same search
    assert counted == [*before, "task"]


def test_a_dense_student_learns_the_answers_in_every_stage(modules):
    training = modules.settings.training_of("sst2", {"epochs": 7, "share": 0.5})
    first, stage = training.stages_of("dense", seed=3)
    assert first.objective.taps == stage.objective.taps == {"logits"}
    assert (stage.epochs, stage.seed, training.share) == (7, 3, 0.5)
    intermediate, own = training.stages_of("svd", seed=3)
    assert intermediate.objective.taps == {"embedding", "ffn"}
    assert own.objective.taps == {"embedding", "ffn", "logits"}
    assert (first.cache_teacher, stage.cache_teacher, own.cache_teacher) == (True, True, False)
    assert (first.epochs, first.batch_size) == (intermediate.epochs, intermediate.batch_size)
    both = [{**LAST, "objective": {"terms": [{"tap": "logits"}, {"tap": "labels"}]}}]
    (mixed,) = modules.settings.training_of("sst2", {"stages": both}).stages_of("dense", seed=3)
    assert mixed.cache_teacher
    with pytest.raises(DistillError, match=r"unknown key 'epoch'.*epochs"):
        modules.settings.training_of("sst2", {"epoch": 7})
    labels = [{**LAST, "objective": {"terms": [{"tap": "labels"}]}}]
    with pytest.raises(DistillError, match="every stage learns from labels"):
        modules.settings.training_of("sst2", {"augment": 2, "stages": labels})
    hidden = [{**LAST, "objective": {"terms": [{"tap": "ffn"}]}}]
    with pytest.raises(DistillError, match="kind 'dense' can have"):
        modules.settings.training_of("sst2", {"stages": hidden}).stages_of("dense", seed=3)


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


def test_rows_of_other_classes_are_refused(modules, options, glue, tmp_path):
    data = modules.data.Rows(options, None)
    mnli = load_task("mnli", data_dir=data.options.data_dir)
    for name in ("train", "dev"):
        lines = (glue / "snli" / f"{name}.tsv").read_text()
        (tmp_path / f"{name}.tsv").write_text(lines.replace("neutral", "unclear"))
    with pytest.raises(DataError, match=r"labels \['unclear'\], but 'mnli' has \('entailment'"):
        modules.data.with_labelled(mnli, str(tmp_path))


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


def test_one_failure_does_not_stop_the_others(modules, options, monkeypatch):
    options.students = ["svd", "kronbert"]
    real = modules.students.build

    def build(kind, *rest):
        student = real(kind, *rest)
        if kind == "svd":
            student.classifier.weight.data.fill_(float("nan"))
        return student

    monkeypatch.setattr(modules.students, "build", build)
    study = modules.runs.Study(options)
    runs = modules.main.runs_of(options)
    (failed,) = modules.main.work(study, runs)
    assert failed.startswith("sst2: svd, factor 3, seed 1: DistillError: diverged")
    assert [study.done(run) for run in runs] == [True, False, True]


def test_list_says_what_is_missing(modules, options):
    study = modules.runs.Study(options)
    teacher, run = modules.main.runs_of(options)
    study.make(teacher)
    lines = modules.main.listed(study, [teacher, run]).splitlines()
    assert lines == [
        "done     sst2: teacher",
        "missing  sst2: kronbert, factor 3, seed 1",
        "1 of 2 done",
    ]


def test_collect_refuses_what_does_not_belong_together(modules, options, tmp_path):
    made(modules, options)
    target = tmp_path / "all.json"
    content = modules.results.collect([Path(options.output)], target)
    assert json.loads(target.read_text()) == content
    (row,) = content["runs"]
    assert row["changes"] == json.loads(json.dumps(SMALL))
    assert set(row["history"][0]) == {"stage", "step", "epoch", "eval_accuracy"}
    assert str(tmp_path) not in target.read_text()
    copy = tmp_path / "copy"
    shutil.copytree(options.output, copy)
    assert modules.results.collect([Path(options.output), copy], target) == content
    path = copy / "sst2/main/kronbert-3-seed1/result.json"
    told = json.loads(path.read_text())

    def refused(match, **changed):
        path.write_text(json.dumps({**told, **changed}))
        with pytest.raises(DataError, match=match):
            modules.results.collect([copy], target)

    refused("another teacher", teacher_digest="0" * 16)
    refused("--limit", asked={**told["asked"], "limit": 7})
    refused("--model", asked={**told["asked"], "model": "another"})
    refused("path of this machine", data=str(tmp_path))
    path.write_text(json.dumps({**told, "scores": {"validation": {"accuracy": 0.0}}}))
    with pytest.raises(DataError, match="different scores"):
        modules.results.collect([Path(options.output), copy], target)
    with pytest.raises(DataError, match="no result"):
        modules.results.collect([tmp_path / "nothing"], target)


def test_tags_keep_variants_apart(modules):
    run = modules.runs.Run(task="sst2", kind="svd", factor=8.0, seed=1)
    assert run.folder(Path("o")) == Path("o/sst2/main/svd-8-seed1")
    assert replace(run, tag="ema").folder(Path("o")) == Path("o/sst2/ema/svd-8-seed1")
