"""The main job: its numbers are real, its state is kept, it starts from any teacher."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import kronbert
from kronbert import job as job_module
from kronbert.distill import finetune, teacher_cache
from kronbert.distill.data import load_folder, tokenize
from kronbert.distill.fidelity import fidelity
from kronbert.distill.finetune import answers, evaluate
from kronbert.distill.recipes.kronbert import ENOUGH
from kronbert.distill.recipes.kronbert import kronbert as own_recipe
from kronbert.distill.retention import retention_error
from kronbert.distill.unlabelled import unlabelled_rows, with_unlabelled
from kronbert.errors import CheckpointError, DistillError, PlanError
from kronbert.job import CompressSettings, compress
from kronbert.job_rows import more_rows
from tests.job_runs import assert_equal, settings_for, task_of_classes, weights

pytestmark = pytest.mark.usefixtures("one_thread", "hurried_report")


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
    error = content["retention_error"]
    assert 0 <= error < 0.1
    assert content["scores"]["commonest_class"] == {
        "validation": {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}
    }
    text = (folder / "report.md").read_text()
    assert "| always the commonest class | 50.0" in text
    models = (AutoModelForSequenceClassification.from_pretrained(folder / who) for who in
              ("student", "teacher"))  # fmt: skip
    own, theirs = (answers(model, rows, tokenizer)["validation"] for model in models)
    agreed = content["fidelity"]["validation"]
    assert agreed == fidelity(own.predictions, theirs.predictions)
    assert error == retention_error(rows.task, own, theirs)
    assert f"% of the accuracy on validation, ± {100 * error:.1f} for want of more rows" in text
    said = f"answers as its teacher does on {100 * agreed['agreement']:.1f} % of the rows of "
    assert f"{said}validation (KL {agreed['kl']:.3f})" in text
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
    assert "intermediate: 2.67 epochs at 0.003, batch 16, up to 64 tokens; task: 1.33 ep" in text
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
    assert said == [f"finished before: {folder / 'report.md'} (the data were not read again)"]


def test_a_report_that_is_gone_is_written_again(finished, tmp_path):
    folder, settings, content, _ = finished
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "report.json").unlink()
    said = []
    again = compress(replace(settings, output=str(copied)), said.append)
    assert again["scores"] == content["scores"]
    assert [line.endswith("done before") for line in said if "/5 " in line] == [True] * 4 + [False]


def test_a_student_that_was_removed_is_not_finished(finished, tmp_path):
    copied = shutil.copytree(finished[0], tmp_path / "copied")
    shutil.rmtree(copied / "student")
    with pytest.raises(CheckpointError, match="student/, which this run made, is gone"):
        compress(replace(finished[1], output=str(copied)), lambda _: None)


def test_second_call_looks_at_data_of_the_caller(finished, tiny_task, monkeypatch):
    """A notebook's next data set, and the output folder of the last one."""
    folder, settings, content, _ = finished
    monkeypatch.setattr(job_module, "_Job", None)
    data, said = load_folder(tiny_task), []
    assert compress(settings, said.append, data) == content
    assert said == [f"finished before: {folder / 'report.md'} (with these data)"]
    turned = replace(data, train=data.train.select([1, 0, *range(2, len(data.train))]))
    with pytest.raises(CheckpointError, match=r"began with the data .*contents are others"):
        compress(settings, said.append, turned)


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
    swapped = [lines[0], lines[2], lines[1], *lines[3:]]
    (task / "train.tsv").write_text("".join(swapped))  # as many rows of the same file
    with pytest.raises(CheckpointError, match=r"began with the data .*contents are others"):
        compress(settings, lambda _: None)
    (task / "train.tsv").write_text("".join(lines))
    with pytest.raises(ZeroDivisionError):
        compress(settings, lambda _: None)


@pytest.mark.parametrize("key", ["unlabelled", "stage1_text"])
def test_another_text_is_refused(key, tiny_bert, tiny_task, tmp_path, monkeypatch):
    text, other = tmp_path / "more.txt", "The film was bad and the soup was cold. " * 9
    text.write_text("The room was dull and the soup was good. " * 9)
    first = text.read_text()
    settings = settings_for(tiny_bert, tiny_task, tmp_path / "out", **{key: str(text)})
    monkeypatch.setattr(job_module._Job, "_teacher", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(settings, lambda _: None)
    text.write_text(other)
    with pytest.raises(CheckpointError, match=r"began with another text in .*more\.txt"):
        compress(settings, lambda _: None)
    text.write_text(first)
    with pytest.raises(ZeroDivisionError):
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
    assert set(content["fidelity"]["validation"]) == {"correlation", "rmse"}
    assert "on validation with a correlation of " in (tmp_path / "out/report.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert model.config.num_labels == 1
    with pytest.raises(DistillError, match=r"its head has 1 output .* has 2 classes"):
        compress(
            settings_for(tmp_path / "out" / "teacher", task_of_classes(tmp_path, 2), tmp_path / "b")
        )


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


def test_data_of_ones_own_with_rows_without_a_label(tiny_bert, tiny_task, tmp_path):
    """The teacher learns from the labels, the student from all."""
    given = load_folder(tiny_task)
    data = with_unlabelled(given, unlabelled_rows(given.task, given.train, "text", limit=40))
    settings = settings_for(tiny_bert, tiny_task, tmp_path, teacher_epochs=0.2, epochs=0.2)
    compress(settings, lambda line: None, data)
    steps = json.loads((tmp_path / "state.json").read_text())["steps"]
    assert "40 rows without a label" in steps["task"]["rows"]


def test_the_teacher_reads_rows_once_where_it_may(finished, tiny_task, tmp_path, monkeypatch):
    teacher, seen = finished[0] / "teacher", []
    real = teacher_cache._Reader.__call__

    def counted(reader, batch):
        seen.append(len(batch["input_ids"]))
        return real(reader, batch)

    monkeypatch.setattr(teacher_cache._Reader, "__call__", counted)
    for name in ("plain", "cached"):
        settings = settings_for(
            teacher, tiny_task, tmp_path / name, epochs=1, cache_teacher=name == "cached"
        )
        compress(settings, lambda line: None)
        assert seen == ([64] * 4 if name == "cached" else [])
        assert not (tmp_path / name / finetune.CACHE).exists()
    plain, cached = (weights(tmp_path / name / "student") for name in ("plain", "cached"))
    for name, value in plain.items():
        assert torch.allclose(cached[name], value, atol=2e-3), name


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
    assert len(more_rows(data, settings, 10**6, tokenizer, table).unlabelled) == 40 * 256
    short = replace(settings, max_length=4)
    assert len(more_rows(data, short, 4 * 256 + 8, tokenizer, table).unlabelled) == 2
    assert more_rows(data, replace(settings, splice=0), 10**6, tokenizer, table) is data
    found = more_rows(data, replace(settings, splice=7, augment=2), 10**6, tokenizer, table)
    assert 7 + 256 < len(found.unlabelled) <= 7 + 2 * 256
    plain, reworded = (
        more_rows(data, replace(settings, splice=7, reword=share), 0, tokenizer, table).unlabelled
        for share in (0.0, 0.5)
    )
    assert len(reworded) == len(plain) == 7
    assert reworded[:] != plain[:]
    for asked in ({"splice": 7}, {"splice": 0, "augment": 1}):
        seeded = [replace(settings, **asked, seed=seed) for seed in (3, 3, 4)]
        one, same, other = (
            more_rows(data, given, 0, tokenizer, table).unlabelled[:] for given in seeded
        )
        assert one == same != other
    assert own_recipe(task="mrpc").tokens_wanted > 0 == own_recipe(task="sst2").tokens_wanted


def test_tokens_tell_a_large_training_set_not_its_name():
    part, whole = own_recipe(task="mnli", tokens=ENOUGH - 1), own_recipe(task="mnli")
    assert part == own_recipe()
    assert whole == own_recipe(task="mnli", tokens=ENOUGH) == own_recipe(tokens=ENOUGH)
    assert [stage.epochs for stage in whole.stages] == [1, 1, 0.5]
    assert [stage.epochs for stage in part.stages] == [1, 1, 0.5]
    assert part.tokens_wanted > 0 == whole.tokens_wanted


@pytest.mark.parametrize(("task", "batch"), [("cola", 128), ("SST2", 64), ("mrpc", 32), (None, 32)])
def test_both_steps_of_the_recipe_have_one_batch_and_the_last_a_fifth_of_the_rate(task, batch):
    first, last = (own_recipe(task=task).stage(name) for name in ("intermediate", "task"))
    assert first.batch_size == last.batch_size == batch
    assert last.learning_rate == pytest.approx(first.learning_rate / 5)


def test_settings_survive_json():
    settings = CompressSettings(model="m", task="t", output="o", factor=8, text_columns=("a", "b"))
    data = json.loads(json.dumps(settings.__dict__))
    assert CompressSettings.from_json(data) == settings
    with pytest.raises(PlanError, match=r"unknown key 'facto'. Nearest: 'factor'"):
        CompressSettings.from_json({**data, "facto": 3})
