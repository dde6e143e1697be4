"""The main job refuses before it trains: models, tasks, stages and folders that cannot be."""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
)

from kronbert import job as job_module
from kronbert.distill.checks import has_masked_lm
from kronbert.distill.data import load_folder
from kronbert.distill.splicing import splice
from kronbert.distill.unlabelled import with_unlabelled
from kronbert.errors import CheckpointError, DataError, DistillError, PlanError
from kronbert.job import CompressSettings, compress
from kronbert.job_folder import JobFolder
from kronbert.job_models import classes_said, open_teacher
from kronbert.job_rows import check_more_rows
from kronbert.job_scores import scores_of
from kronbert.pretrain import PretrainSettings
from tests.job_runs import settings_for, task_of_classes

pytestmark = pytest.mark.usefixtures("one_thread", "hurried_report")


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
        model=str(teacher), task=str(task_of_classes(tmp_path, 3)),
    )  # fmt: skip
    turned = shutil.copytree(teacher, tmp_path / "turned")
    config = json.loads((turned / "config.json").read_text())
    config["id2label"] = {"0": "glad", "1": "cross"}
    config["label2id"] = {"glad": 0, "cross": 1}
    (turned / "config.json").write_text(json.dumps(config))
    settings, data = settings_for(turned, tiny_task, tmp_path / "own"), load_folder(tiny_task)
    with pytest.raises(DistillError, match=r"its classes are \['glad', 'cross'\]"):
        compress(settings, lambda _: None, data)
    config["problem_type"] = "multi_label_classification"
    (turned / "config.json").write_text(json.dumps(config))
    refuse(DistillError, "any number of classes .*'multi_label_classification'", model=str(turned))


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
    refuse(PlanError, r"compress\(epochs=-1\): expected a number > 0", epochs=-1)
    refuse(PlanError, r"compress\(epochs='3'\): expected a number > 0", epochs="3")
    refuse(PlanError, r"learning_rate=inf\): expected a number > 0", learning_rate=math.inf)
    refuse(PlanError, "teacher_learning_rate=0.0", teacher_learning_rate=0.0)
    refuse(PlanError, r"batch_size=0\): expected 1 or more", batch_size=0)
    refuse(PlanError, r"max_length=8.5\): expected 1 or more", max_length=8.5)
    refuse(PlanError, r"augment=True\): expected 0 or more", augment=True)
    refuse(DistillError, "precision='fp8'", precision="fp8")
    refuse(PlanError, "stage1_epochs=0", stage1_text=str(text), stage1_epochs=0)
    refuse(DataError, "no such file", stage1_text=str(tmp_path / "none.txt"))
    refuse(DataError, "do not fill one block", stage1_text=str(text))


def test_labels_that_rows_lack(refuse, tiny_task, monkeypatch):
    data = load_folder(tiny_task)
    data = with_unlabelled(data, splice(data, count=8))
    monkeypatch.setattr(job_module, "open_data", lambda *_, **__: data)
    refuse(DistillError, "learns from labels, but 8 of", factor=None, preset="k8")


def test_rows_without_a_label_that_cannot_be(refuse, tiny_bert, tiny_task, tmp_path):
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
    head = [f"{i} {i + 1}\t{('good', 'bad')[i % 2]}" for i in range(64)]
    tail = [f"the film was kind\t{('good', 'bad')[i % 2]}" for i in range(200)]
    (numbers / "train.tsv").write_text("\n".join(["text\tlabel", *head, *tail]) + "\n")
    settings = settings_for(tiny_bert, numbers, tmp_path / "sorted", augment=1, splice=0)
    job_module._Job(settings, JobFolder(str(tmp_path / "sorted"), {}, print), None)
    match = "1 training rows, expected 2 or more.* --splice 0"
    refuse(DataError, match, limit=1, splice=None)


def test_a_job_from_before_words_became_others_goes_on(tiny_bert, tiny_task, tmp_path):
    settings = asdict(settings_for(tiny_bert, tiny_task, tmp_path / "out"))
    before = {key: value for key, value in settings.items() if key != "reword"}
    JobFolder(tmp_path / "out", before, print).begin("rows", "digest")
    JobFolder(tmp_path / "out", settings, print)
    with pytest.raises(CheckpointError, match=r"reword None -> 0\.1"):
        JobFolder(tmp_path / "out", {**settings, "reword": 0.1}, print)


def test_words_of_splices_that_are_not_there(refuse, tiny_bert, tiny_task, tokenizer, tmp_path):
    refuse(PlanError, r"reword=1\.0", splice=None, reword=1.0)
    refuse(PlanError, "without splices", splice=0, reword=0.1)
    refuse(PlanError, r"reword=.* give rows without labels", factor=None, preset="k8",
           splice=None, reword=0.1)  # fmt: skip
    settings = settings_for(tiny_bert, tiny_task, tmp_path / "out", splice=None, reword=0.1)
    data, table = load_folder(tiny_task), torch.zeros(len(tokenizer), 8)
    check_more_rows(data, settings, 10**6, tokenizer, table)
    with pytest.raises(DataError, match=r"has rows enough.* --splice"):
        check_more_rows(data, settings, 0, tokenizer, table)


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
    for name in ("start", "intermediate", "task-run", "teacher-outputs", "report.md"):
        (tmp_path / name / name).mkdir(parents=True)
        refuse(CheckpointError, f"holds {name}, but no state.json", output=tmp_path / name)
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


def test_a_base_model_with_missing_weights(refuse, tiny_bert, tiny_task, tmp_path):
    """A new head and a pooler that was not saved may be random, nothing else."""
    from safetensors.torch import load_file, save_file

    def changed(name, change):
        folder = shutil.copytree(tiny_bert, tmp_path / name)
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    without = changed("layer", lambda w: {k: v for k, v in w.items() if "layer.1." not in k})
    refuse(DistillError, r"layer: without bert\.encoder\.layer\.1.*random numbers", model=without)
    renamed = changed("ddp", lambda w: {f"module.{k}": v for k, v in w.items()})
    refuse(DistillError, r"ddp: without bert\.embeddings", model=renamed)
    bare = changed("bare", lambda w: {k: v for k, v in w.items() if "pooler" not in k})
    assert open_teacher(bare, load_folder(tiny_task).task)[1] is False


def test_a_discriminator_has_no_masked_lm_head(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    heads = {"BertForMaskedLM": True, "BertForPreTraining": True, "ElectraForMaskedLM": True,
             "ElectraForPreTraining": False, "BertModel": False, "GPT2LMHeadModel": False,
             "T5ForConditionalGeneration": False}  # fmt: skip
    for name, expected in heads.items():
        assert has_masked_lm(BertConfig(architectures=[name]), tokenizer) is expected


def test_whole_numbers_of_numpy_are_python_s(tmp_path):
    given = {"seed": np.int64(7), "batch_size": np.int32(8), "epochs": np.float64(2)}
    settings = CompressSettings(model="m", task="t", output=str(tmp_path), factor=8, **given)
    assert json.loads(json.dumps(asdict(settings)))["seed"] == 7


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_would_not_take(seed, tmp_path):
    with pytest.raises(PlanError, match=rf"compress\(seed={seed}\): expected 0 to 4294967295"):
        CompressSettings(model="m", task="t", output=str(tmp_path), factor=8, seed=seed)
    with pytest.raises(PlanError, match=rf"pretrain-student\(seed={seed}\): expected 0 to"):
        PretrainSettings(model="m", text="t", output=str(tmp_path), factor=8, seed=seed)


def test_heads_that_classify_something_else(refuse, tiny_bert, tmp_path):
    tagger = AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=5)
    tagger.save_pretrained(tmp_path / "tagger")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "tagger")
    said = (
        "BertForTokenClassification, whose head classifies something else than rows. Give its base"
    )
    refuse(DistillError, said, model=str(tmp_path / "tagger"))


def test_a_base_that_another_task_has_left(tiny_bert, tiny_task, tmp_path):
    """Its problem_type would be taken for the new head's."""
    other = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=1, problem_type="regression"
    )
    other.base_model.save_pretrained(tmp_path / "base")
    model, tuned = open_teacher(str(tmp_path / "base"), load_folder(tiny_task).task)
    assert not tuned
    ids = torch.randint(5, 20, (3, 6))
    assert model(ids, labels=torch.tensor([0, 1, 1])).loss.isfinite()
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cross", "glad"], ""),
        (["Cross", "GLAD"], ""),
        (
            ["sad", "happy"],
            "; its classes ['sad', 'happy'] stand for ['cross', 'glad'], in this order",
        ),
        (
            ["LABEL_0", "LABEL_1"],
            "; its classes ['LABEL_0', 'LABEL_1'] stand for ['cross', 'glad'], in this order",
        ),
    ],
)
def test_what_a_heads_classes_are_taken_for(tiny_task, tmp_path, tiny_bert, names, said):
    task = load_folder(tiny_task).task
    config = BertConfig(id2label=dict(enumerate(names)))
    assert classes_said(config, task) == said
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, id2label=dict(enumerate(names))
    )
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    assert scores_of(str(tmp_path / "model"), str(tiny_task)).what.endswith(f"{said})")
