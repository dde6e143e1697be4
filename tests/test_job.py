"""The main job: its numbers are real, it resumes after kill -9, and it refuses before training."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import kronbert
from kronbert import job as job_module
from kronbert import job_report
from kronbert.distill.data import load_folder, tokenize
from kronbert.distill.finetune import evaluate
from kronbert.distill.recipes.kronbert import kronbert as own_recipe
from kronbert.errors import CheckpointError, DataError, DistillError, PlanError
from kronbert.job import CompressSettings, compress
from kronbert.job_rows import more_rows

ROOT = Path(__file__).resolve().parent.parent
# 16 rows a step, 256 rows: 16 steps an epoch.
SHORT = {"teacher_epochs": 3, "teacher_learning_rate": 3e-3, "epochs": 4, "learning_rate": 3e-3,
         "batch_size": 16, "precision": "fp32", "splice": 0}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small lose by a second thread; the killed command has one, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def hurried_report(monkeypatch):
    """Latency is timed for a moment only: its figures are not read here."""
    full = job_report.report
    monkeypatch.setattr(job_report, "report", lambda *a, **k: full(*a, **{**k, "seconds": 0.05}))


def settings_for(model, task, output, **changes):
    return CompressSettings(
        **{"model": str(model), "task": str(task), "output": str(output), "factor": 3.8}
        | SHORT
        | changes
    )


def weights(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def finished(tiny_bert, tiny_task, tmp_path_factory, one_thread):
    """(folder, settings, report.json's content, what was said) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("jobs") / "whole"
    settings = settings_for(tiny_bert, tiny_task, folder)
    said = []
    full = job_report.report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_report, "report", lambda *a, **k: full(*a, **{**k, "seconds": 0.05}))
        content = compress(settings, said.append)
    return folder, settings, content, said


def test_report_says_what_the_saved_models_do(finished, tiny_task):
    folder, _, content, _ = finished
    assert content == json.loads((folder / "report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = tokenize(load_folder(tiny_task), tokenizer, 64)
    for who in ("teacher", "student"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / who)
        assert evaluate(model, rows, tokenizer) == content["scores"][who]
        counted = sum(p.numel() for p in model.parameters())
        assert content["measured"][who]["parameters"] == counted
    teacher, student, before = (
        content["scores"][who]["validation"]["accuracy"]
        for who in ("teacher", "student", "student_before_distillation")
    )
    assert teacher > 0.75  # the rule was learnt
    assert min(student, before) > 0.75  # fitted to the data, it has the rule from the start
    logged = content["history"]["intermediate"]
    losses = [row["loss_ffn"] for row in logged if "loss_ffn" in row]
    assert losses[-1] < 0.6 * losses[0], "distillation taught nothing"
    assert content["retention"] == pytest.approx(student / teacher)
    assert content["scores"]["commonest_class"] == {
        "validation": {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}
    }
    assert "| always the commonest class | 50.0" in (folder / "report.md").read_text()
    assert 3.8 <= content["measured"]["factor"] <= 3.92
    assert content["metric"] == "validation accuracy"
    assert not content["synthetic"]
    assert content["teacher_fine_tuned_here"]


def test_report_and_pictures_are_there(finished):
    folder, _, content, said = finished
    text = (folder / "report.md").read_text()
    score = 100 * content["scores"]["student"]["validation"]["accuracy"]
    assert f"| student, distilled | {score:.1f} |" in text
    kept = f"keeps {100 * content['retention']:.1f} % of the accuracy on validation"
    assert re.search(rf"is 3\.8 times smaller .* (faster|slower) at batch 1; it {kept}", text)
    assert "teacher: 3 epochs at 0.003, batch 16, up to 64 tokens; interm" in text
    assert "intermediate: 3.2 epochs at 0.003, batch 16, up to 64 tokens; task: 0.8 ep" in text
    assert "tiny/tiny-bert" not in text  # where it lies is nobody's business
    assert "tiny-bert on moods" in text
    for name in ("learning_curve", "size_speed_score", "error_per_layer"):
        picture = folder / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text
    assert not list(folder.glob("*-run")), "checkpoints are left over"
    numbered = [line[:3] for line in said if line[1:3] == "/5"]
    assert numbered == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    (line,) = [line for line in said if line.startswith("fitted: ")]
    error = content["hidden_errors"]["fitted"]
    assert line == f"fitted: {error:.3f} from the teacher's hidden states, taken"
    assert content["start"] is None


def test_model_folder_is_untouched(tiny_bert, finished):
    loaded = AutoModelForSequenceClassification.from_pretrained(finished[0] / "teacher")
    assert not hasattr(loaded.config, "quantization_config")
    assert {p.name for p in tiny_bert.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_second_call_reads_the_state(finished, monkeypatch):
    folder, settings, content, _ = finished
    monkeypatch.setattr(job_module, "_Job", None)  # nothing is opened, nothing is run
    said = []
    assert compress(settings, said.append) == content
    assert said == [f"finished before: {folder / 'report.md'}"]


def test_a_lost_report_is_written_again(finished):
    folder, settings, content, _ = finished
    (folder / "report.json").unlink()
    state = folder / "state.json"
    steps = json.loads(state.read_text())
    del steps["steps"]["report"]
    state.write_text(json.dumps(steps))
    said = []
    again = compress(settings, said.append)
    assert again["scores"] == content["scores"]
    assert [line.endswith("done before") for line in said] == [True] * 4 + [False]


def test_other_settings_are_refused(finished):
    folder, settings, _, _ = finished
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(CheckpointError, match=r"other settings \(factor 3\.8 -> 4\.0, seed 42"):
        compress(replace(settings, factor=4.0, seed=1))
    assert sorted(p.name for p in folder.iterdir()) == before


def test_settings_are_kept_from_the_first_moment(tiny_bert, tiny_task, tmp_path, monkeypatch):
    """A run killed before its first step is done must not be resumed with other settings."""
    settings = settings_for(tiny_bert, tiny_task, tmp_path / "out")
    monkeypatch.setattr(job_module._Job, "_teacher", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(settings, lambda _: None)
    with pytest.raises(CheckpointError, match="other settings"):
        compress(replace(settings, epochs=1), lambda _: None)


def test_other_data_are_refused(tiny_bert, tiny_task, tmp_path, monkeypatch):
    task = shutil.copytree(tiny_task, tmp_path / "moods")
    settings = settings_for(tiny_bert, task, tmp_path / "out")
    monkeypatch.setattr(job_module._Job, "_teacher", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(settings, lambda _: None)
    lines = (task / "train.tsv").read_text().splitlines(keepends=True)
    (task / "train.tsv").write_text("".join(lines[:-6]))
    with pytest.raises(CheckpointError, match=r"began with the data .*256 train.*250 train"):
        compress(settings, lambda _: None)


def test_fine_tuned_teacher_is_taken_as_it_is(finished, tiny_task, tmp_path):
    """With stage 1, whose text is the training sentences."""
    text = tmp_path / "text.txt"
    sentences = (tiny_task / "train.tsv").read_text().splitlines()[1:]
    text.write_text("\n".join(line.split("\t")[0] for line in sentences) + "\n")
    source = finished[0] / "teacher"
    said = []
    settings = settings_for(
        source, tiny_task, tmp_path / "out", stage1_text=str(text), stage1_epochs=8,
        stage1_learning_rate=3e-3, epochs=2,
    )  # fmt: skip
    content = compress(settings, said.append)
    assert_equal(weights(tmp_path / "out" / "teacher"), weights(source))
    assert not content["teacher_fine_tuned_here"]
    assert content["history"]["teacher"] == []
    losses = [row["loss"] for row in content["history"]["stage1"] if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert any(line.startswith("2/5 stage 1") for line in said)
    assert content["hidden_errors"] is None
    learnt = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "stage1")
    rows = tokenize(load_folder(tiny_task), AutoTokenizer.from_pretrained(source), 64)
    assert (
        evaluate(learnt, rows, AutoTokenizer.from_pretrained(source))
        == (content["scores"]["student_before_distillation"])
    ), "stage 2 did not start from stage 1's student"


def test_stage_1_trains_the_masked_lm_where_there_is_one(tiny_bert, tiny_task, tmp_path):
    """Teacher: the pre-trained model with its head; only the body goes on to the task."""
    from transformers import AutoModelForMaskedLM

    masked = tmp_path / "masked"
    AutoModelForMaskedLM.from_pretrained(tiny_bert).save_pretrained(masked)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(masked)
    text = tmp_path / "text.txt"
    text.write_text("the soup was good and the room was cold here today\n" * 200)
    output = tmp_path / "out"
    settings = settings_for(
        masked,
        tiny_task,
        output,
        stage1_text=str(text),
        stage1_epochs=3,
        stage1_learning_rate=3e-3,
        epochs=0.1,
        learning_rate=1e-7,
        max_length=32,
    )
    content = compress(settings)
    logged = [entry for entry in content["history"]["stage1"] if "loss_mlm" in entry]
    assert logged[-1]["loss_mlm"] < 0.9 * logged[0]["loss_mlm"]
    assert logged[-1]["loss_ffn"] < logged[0]["loss_ffn"]
    teacher, learnt, student = (weights(output / n) for n in ("teacher", "stage1", "student"))
    assert learnt.keys() == student.keys()
    assert torch.equal(learnt["classifier.weight"], teacher["classifier.weight"])
    # Stage 2 at a rate of 1e-7 leaves the body as stage 1 made it.
    name = "bert.encoder.layer.0.intermediate.dense.b"
    torch.testing.assert_close(learnt[name], student[name], atol=1e-4, rtol=0)
    fresh = kronbert.convert(
        AutoModelForSequenceClassification.from_pretrained(output / "teacher"), factor=3.8
    ).state_dict()
    assert (learnt[name] - fresh[name]).abs().max() > 1e-3


def test_regression(tiny_bert, tmp_path):
    task = tmp_path / "scores"
    task.mkdir()
    words = ["the", "film", "was", "good", "bad"]
    for name, rows in (("train", 48), ("dev", 24)):
        lines = ["text\tscore"]
        lines += [f"{' '.join(words[: 2 + i % 4])}\t{(i % 4) / 2}" for i in range(rows)]
        (task / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    settings = settings_for(tiny_bert, task, tmp_path / "out")
    content = compress(settings, lambda _: None)
    assert set(content["scores"]["student"]["validation"]) == {"spearman", "pearson"}
    assert content["scores"]["teacher"]["validation"]["spearman"] > 0.5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert model.config.num_labels == 1
    with pytest.raises(DistillError, match=r"its head has 1 output .* has 2 classes"):
        compress(settings_for(tmp_path / "out" / "teacher", _three(tmp_path, 2), tmp_path / "b"))


def _three(tmp_path, classes):
    task = tmp_path / f"classes{classes}"
    task.mkdir(exist_ok=True)
    for name in ("train", "dev"):
        rows = [f"the film\tc{i % classes}" for i in range(12)]
        (task / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return task


# --- kill -9 -------------------------------------------------------------------------------------


def kill_in(step, settings, folder):
    """Start the command, and kill it when the step has its first whole checkpoint."""
    words = ["--model", settings.model, "--task", settings.task, "--factor", "3.8", "--output",
             str(folder)]  # fmt: skip
    for key, value in SHORT.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "kronbert", "compress", *words],
            stdout=out, stderr=out, env=env, cwd=folder.parent,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and run.poll() is None:
            if any(map(_whole, (folder / f"{step}-run").glob("checkpoint-*"))):
                run.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        run.wait(timeout=30)
    assert run.returncode == -signal.SIGKILL, log.read_text()[-2000:]
    assert list((folder / f"{step}-run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("step", "broken", "before"),
    [("teacher", False, 0), ("intermediate", False, 2), ("task", True, 3)],
)
def test_killed_run_resumes_to_the_same_student(finished, tmp_path, step, broken, before):
    whole, settings, content, _ = finished
    folder = tmp_path / "killed"
    kill_in(step, settings, folder)
    if broken:
        # What a kill in the middle of writing the next checkpoint leaves.
        first = max(filter(_whole, (folder / f"{step}-run").glob("checkpoint-*")), key=_number)
        newest = shutil.copytree(first, first.with_name(f"checkpoint-{_number(first) + 3}"))
        model = newest / "model.safetensors"
        model.write_bytes(model.read_bytes()[:-500])
    said = []
    again = compress(replace(settings, output=str(folder)), said.append)
    resumed = [line for line in said if line.startswith("resumed after step")]
    assert len(resumed) == 1
    assert int(resumed[0].split()[-1]) > 0
    done = [line.endswith("done before") for line in said if "/5 " in line]
    assert done == [True] * before + [False] * (5 - before)
    assert_equal(weights(folder / "teacher"), weights(whole / "teacher"))
    assert_equal(weights(folder / "student"), weights(whole / "student"))
    assert again["scores"] == content["scores"]


def _whole(path):
    """The state is a checkpoint's last file; for a moment it is there and empty."""
    try:
        json.loads((path / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _number(path):
    return int(path.name.rpartition("-")[2])


def test_kill_between_training_and_record_repeats_no_training(finished, tmp_path, monkeypatch):
    """The last checkpoint stays until the step is recorded."""
    whole, settings, _, _ = finished
    settings = replace(settings, output=str(tmp_path / "out"))
    save = job_module.JobFolder.save_model

    def killed(self, model, tokenizer, name):
        (self.path / f".{name}.part").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(job_module.JobFolder, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(settings, lambda _: None)
    monkeypatch.setattr(job_module.JobFolder, "save_model", save)
    said = []
    compress(settings, said.append)
    assert "resumed after step 48" in said  # 3 epochs of 16
    assert_equal(weights(tmp_path / "out" / "student"), weights(whole / "student"))


# --- refused before anything is trained ----------------------------------------------------------


@pytest.fixture
def refuse(tiny_bert, tiny_task, tmp_path, monkeypatch):
    """Calls compress, expects the error, and that nothing was begun."""
    monkeypatch.setattr(job_module._Job, "run", lambda self: pytest.fail("it began"))

    def call(error, match, *, output=None, **changes):
        target = output or tmp_path / "out"
        with pytest.raises(error, match=match) as caught:
            compress(
                settings_for(**{"model": tiny_bert, "task": tiny_task, "output": target} | changes),
                lambda _: None,
            )
        assert not (Path(target) / "state.json").exists()
        return str(caught.value)

    return call


def test_unreachable_factor(refuse):
    refuse(PlanError, "factor=400 is out of reach", factor=400.0)
    refuse(PlanError, "factor", factor=0.5)
    with pytest.raises(PlanError, match="one of them"):
        CompressSettings(model="m", task="t", output="o")
    with pytest.raises(PlanError, match=r"stage1_epochs= without stage1_text="):
        CompressSettings(model="m", task="t", output="o", factor=2, stage1_epochs=1)


def test_models_that_are_not_there(refuse, tmp_path):
    refuse(DataError, r"nowhere/model': no such folder\.$", model=str(tmp_path / "nowhere/model"))
    refuse(DataError, "no such folder here, and the Hugging Face hub", model="nobody/nothing")
    (tmp_path / "empty").mkdir()
    refuse(DataError, "holds no config.json", model=str(tmp_path / "empty"))
    (tmp_path / "file").write_text("")
    refuse(DataError, "a file; expected the folder", model=str(tmp_path / "file"))


def test_broken_models(refuse, tiny_bert, finished, tmp_path):
    cut = shutil.copytree(tiny_bert, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((tiny_bert / "model.safetensors").read_bytes()[:-99])
    refuse(DataError, "the folder cannot be read", model=str(cut))
    bare = shutil.copytree(tiny_bert, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    refuse(DataError, "holds no tokenizer", model=str(bare))
    model = AutoModelForSequenceClassification.from_pretrained(finished[0] / "teacher")
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = float("nan")
    nan = shutil.copytree(tiny_bert, tmp_path / "nan")
    model.save_pretrained(nan)
    refuse(DistillError, r"'bert\.pooler\.dense\.weight' holds NaN", model=str(nan))
    refuse(PlanError, "converted before", model=str(finished[0] / "student"))


def test_headless_fine_tuned_teacher(refuse, finished, tiny_bert, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(finished[0] / "teacher", tmp_path / "headless")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refuse(DistillError, r"without classifier\.weight, which would be random", model=str(folder))


def test_teacher_and_task_that_do_not_go_together(refuse, finished, tiny_task, tmp_path):
    teacher = finished[0] / "teacher"
    refuse(
        DistillError, "its head has 2 classes, task 'classes3' has 3 classes",
        model=str(teacher), task=str(_three(tmp_path, 3)),
    )  # fmt: skip
    turned = shutil.copytree(teacher, tmp_path / "turned")
    config = json.loads((turned / "config.json").read_text())
    config["id2label"] = {"0": "glad", "1": "cross"}
    config["label2id"] = {"glad": 0, "cross": 1}
    (turned / "config.json").write_text(json.dumps(config))
    refuse(DistillError, r"its classes are \['glad', 'cross'\]", model=str(turned))


def test_tokenizers_that_do_not_fit(refuse, tiny_bert, tmp_path):
    large = shutil.copytree(tiny_bert, tmp_path / "large")
    tokenizer = AutoTokenizer.from_pretrained(large)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(large)
    refuse(DistillError, r"tokenizer has 30 tokens, its embedding 29 rows", model=str(large))
    padless = shutil.copytree(tiny_bert, tmp_path / "padless")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(padless)
    refuse(DistillError, "no padding token", model=str(padless))
    refuse(DataError, r"max_length=65: .* takes 64 tokens", max_length=65)


def test_data_that_do_not_fit(refuse, tiny_task, tmp_path):
    refuse(DataError, "no column 'mood'", label_column="mood", text_columns=("text",))
    refuse(DataError, "no such folder", task=str(tmp_path / "no"))
    refuse(DataError, "unknown task 'sst3'", task="sst3")
    refuse(DataError, "columns are for a folder", data_dir="x", label_column="label")
    bad = shutil.copytree(tiny_task, tmp_path / "bad")
    with (bad / "dev.tsv").open("a") as file:
        file.write("the film\tlukewarm\n")
    refuse(DataError, r"dev\.tsv, line 98: unknown label 'lukewarm'", task=str(bad))


def test_stages_that_cannot_be(refuse, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the film\n")
    refuse(DistillError, "epochs=-1", epochs=-1)
    refuse(DistillError, "learning_rate=0", teacher_learning_rate=0.0)
    refuse(DistillError, "precision='fp8'", precision="fp8")
    refuse(DistillError, "epochs=0", stage1_text=str(text), stage1_epochs=0)
    refuse(DataError, "no such file", stage1_text=str(tmp_path / "none.txt"))
    refuse(DataError, "do not fill one block", stage1_text=str(text))


def test_rows_without_a_label_that_cannot_be(refuse, tiny_task, tmp_path):
    refuse(DataError, "no such file", unlabelled=str(tmp_path / "none.txt"))
    (tmp_path / "short.txt").write_text("film\n")
    refuse(DataError, "no sentence in it", unlabelled=str(tmp_path / "short.txt"))
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    for name in ("train", "dev"):
        rows = [f"{i} {i + 1}\t{('good', 'bad')[i % 2]}" for i in range(20)]
        (numbers / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    match = "no word of the training rows can be replaced"
    refuse(DataError, match, task=str(numbers), augment=1)
    match = "1 training rows, expected 2 or more.* --splice 0"
    refuse(DataError, match, limit=1, splice=None)


def test_architecture_without_taps(refuse, tiny_bert, tmp_path):
    from transformers import FNetConfig, FNetModel

    folder = shutil.copytree(tiny_bert, tmp_path / "fnet")
    FNetModel(FNetConfig(vocab_size=29, hidden_size=32, num_hidden_layers=1, intermediate_size=64,
                         max_position_embeddings=64)).save_pretrained(folder)  # fmt: skip
    refuse(DistillError, "fnet", model=str(folder), factor=2.0)


def test_output_folders(refuse, finished, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refuse(CheckpointError, r"cannot be written \(Not a directory", output=tmp_path / "file/out")
    (tmp_path / "taken" / "teacher").mkdir(parents=True)
    refuse(CheckpointError, "holds teacher, but no state.json", output=tmp_path / "taken")
    usage = shutil.disk_usage(tmp_path)._replace(free=2**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refuse(CheckpointError, "0 MiB free, about 1 MiB needed")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output(refuse, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse(CheckpointError, "Permission denied", output=tmp_path / "locked" / "out")


def test_full_disk(refuse, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    refuse(CheckpointError, r"cannot be written \(No space left on device\)")


def test_unreadable_state(tiny_bert, tiny_task, tmp_path):
    for text in ("{", "[]", '{"settings": {}}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match="not the state of a run"):
            compress(settings_for(tiny_bert, tiny_task, tmp_path))


def test_one_process(finished, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistillError, match="one process"):
        compress(finished[1])


def test_diverged_teacher_is_no_result(tiny_bert, tiny_task, tmp_path):
    settings = settings_for(tiny_bert, tiny_task, tmp_path / "out", teacher_learning_rate=1e30)
    with pytest.raises(DistillError, match=r"the teacher gives NaN .* --teacher-learning-rate"):
        compress(settings, lambda _: None)
    assert not (tmp_path / "out" / "teacher").exists()


def test_stage_2_reads_rows_without_a_label(tiny_bert, tiny_task, tmp_path):
    text = tmp_path / "more.txt"
    text.write_text("The soup was good. The room was dull.\nThe film was fine and kind.\n")
    output = tmp_path / "out"
    changes = {"augment": 2, "unlabelled": str(text), "epochs": 1}
    compress(settings_for(tiny_bert, tiny_task, output, **changes), lambda line: None)
    said = json.loads((output / "state.json").read_text())["steps"]["task"]["rows"]
    more = int(re.search(r"(\d+) rows without a label", said)[1])
    assert 256 + 3 <= more <= 2 * 256 + 3
    with pytest.raises(PlanError, match="from which KroneckerBERT's recipe"):
        CompressSettings(model="m", task="t", output="o", preset="k8", augment=2)
    for key in ("augment", "splice"):
        with pytest.raises(PlanError, match=rf"compress\({key}=-1\): expected 0 or more"):
            CompressSettings(model="m", task="t", output="o", factor=8, **{key: -1})


def test_the_recipe_fills_up_small_training_sets(tiny_bert, tiny_task):
    data, settings = (
        load_folder(tiny_task),
        CompressSettings(model="m", task="t", output="o", factor=8),
    )
    tokenizer, table = AutoTokenizer.from_pretrained(tiny_bert), torch.randn(1000, 8)
    own = sum(map(len, tokenize(data, tokenizer).train["input_ids"]))
    for wanted in (0, own, own + 300, 4 * own):
        more = more_rows(data, settings, wanted, tokenizer, table)
        assert (more is data) == (wanted <= own)
        tokens = tokenize(more, tokenizer)
        parts = (tokens.train, tokens.unlabelled or ())
        held = sum(len(row["input_ids"]) for part in parts for row in part)
        assert 0.9 * max(wanted, own) < held < 1.1 * max(wanted, own)
    assert len(more_rows(data, settings, 10**6, tokenizer, table).unlabelled) == 20 * 256
    short = replace(settings, max_length=4)
    assert len(more_rows(data, short, 4 * 256 + 8, tokenizer, table).unlabelled) == 2
    assert more_rows(data, replace(settings, splice=0), 10**6, tokenizer, table) is data
    found = more_rows(data, replace(settings, splice=7, augment=2), 10**6, tokenizer, table)
    assert 7 + 256 < len(found.unlabelled) <= 7 + 2 * 256
    assert own_recipe(task="mrpc").tokens_wanted > 0 == own_recipe(task="sst2").tokens_wanted


def test_settings_survive_json():
    settings = CompressSettings(model="m", task="t", output="o", factor=8, text_columns=("a", "b"))
    data = json.loads(json.dumps(settings.__dict__))
    assert CompressSettings.from_json(data) == settings
    with pytest.raises(PlanError, match=r"unknown key 'facto'. Nearest: 'factor'"):
        CompressSettings.from_json({**data, "facto": 3})
