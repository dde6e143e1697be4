"""The GLUE study on a tiny BERT: its runs, skipping, resuming, locks, collecting."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from kronbert.distill.finetune import use_bf16
from kronbert.errors import DataError, DistillError
from kronbert.job_models import open_model
from tests.small_study import LAST, SMALL, made

SCORED = ("scores", "fidelity", "retention_error", "outside")


def test_a_run_is_made_once_and_says_where_it_comes_from(modules, options, glue, counted):
    options.ood_dir, options.ood_limit = str(glue / "ood"), 10
    options.students = ["kronbert", "svd", "svd-fitted"]
    rows = made(modules, options)
    assert counted == ["teacher", "task", "task", "task"]
    row = rows["kronbert"]
    assert row["init"] == "data"
    assert rows["svd"]["init"] == "weights"
    assert rows["svd-fitted"]["init"] == "data"
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
    assert counted == ["teacher", "task", "task", "task"]
    (folder / "result.json").unlink()
    made(modules, options)
    assert counted == ["teacher", "task", "task", "task", "task"]


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


def test_a_part_of_a_large_task_is_trained_like_a_small_one(modules, options):
    options.stage = None
    study = modules.runs.Study(options)
    assert study.training("sst2") == modules.settings.training_of("mrpc", {})
    assert study.rows.tokens("sst2", study.training("sst2")).unlabelled
    assert modules.settings.training_of("sst2", {}).stages[0]["epochs"] == 1


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


def test_a_student_of_fewer_layers_learns_from_those_it_has(modules):
    training = modules.settings.training_of("sst2", {"layers": 4})
    maps = {stage.objective.layer_map for stage in training.stages_of("svd", seed=3)}
    assert maps == {"uniform"}
    assert modules.settings.before_last(training.to_dict())["layers"] == 4
    with pytest.raises(DistillError, match="goes on from another has its depth"):
        modules.settings.training_of("rte", {"layers": 4, "start": "mnli"})


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


def test_words_of_splices_that_are_not_there(modules, options):
    with pytest.raises(DistillError, match=r"reword=0\.1: without splices"):
        modules.settings.training_of("mrpc", {"reword": 0.1, "splice": 0})
    training = modules.settings.training_of("sst2", {"reword": 0.1}, tokens=10**6)
    study = modules.runs.Study(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules.data, "tokens_in", lambda *_: 10**6)
        with pytest.raises(DataError, match="has rows enough, so no splices"):
            study.rows.tokens("sst2", training)
