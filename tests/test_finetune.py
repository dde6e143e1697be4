"""One stage: whole checkpoints, batches that no interruption changes, scores in the rows' order."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

import kronbert
from kronbert.distill import Objective, Stage, Term, finetune, freed
from kronbert.distill.checkpoints import last_checkpoint
from kronbert.distill.data import TaskData
from kronbert.distill.finetune import (
    answers,
    commonest_class,
    evaluate,
    labels_only,
    run_stage,
    use_bf16,
)
from kronbert.distill.sampling import SeededSampler
from kronbert.distill.tasks import Task
from kronbert.errors import DistillError

STAGE = Stage(name="teacher", objective=labels_only(), learning_rate=1e-3, epochs=2, batch_size=16)


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(folder):
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class _Interrupt(TrainerCallback):
    """A power cut after the step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(monkeypatch):
    """Runs a stage that ends in a KeyboardInterrupt after a step."""

    def run(step, *args, **kwargs):
        with monkeypatch.context() as patch:
            real = finetune._StageTrainer.train

            def train(self, *a, **k):
                self.add_callback(_Interrupt(step))
                return real(self, *a, **k)

            patch.setattr(finetune._StageTrainer, "train", train)
            with pytest.raises(KeyboardInterrupt):
                run_stage(*args, **kwargs)

    return run


# 32 steps, a checkpoint after 4, 8, ...: in the first epoch, at its end, in the second.
@pytest.mark.parametrize("step", [6, 16, 27])
def test_interruption_changes_no_weight(step, interrupted, tiny_bert, rows, tokenizer, tmp_path):
    given = {"tokenizer": tokenizer, "precision": "fp32", "checkpoints": 8}
    whole = model_of(tiny_bert)
    log = run_stage(whole, None, STAGE, rows, tmp_path / "a", **given)
    interrupted(step, model_of(tiny_bert), None, STAGE, rows, tmp_path / "b", **given)
    said = []
    other = model_of(tiny_bert)
    with torch.no_grad():
        other.classifier.weight.zero_()  # whatever it starts from, the checkpoint counts
    again = run_stage(other, None, STAGE, rows, tmp_path / "b", say=said.append, **given)
    saved = step // 4 * 4 - (4 if step % 4 == 0 else 0)  # the cut comes before the save
    assert said == [f"resumed after step {saved}"]
    for name, value in state_of(whole).items():
        assert torch.equal(other.state_dict()[name], value), name
    steps, seen = ([row["step"] for row in history if "loss" in row] for history in (log, again))
    assert steps == seen
    assert not list((tmp_path / "b").glob("checkpoint-*"))


def test_every_row_once_an_epoch_in_another_order():
    epoch = 0
    lengths = [5, 9, 7, 5, 3, 8, 8, 2, 4, 6]
    sampler = SeededSampler(10, lengths, 2, lambda: epoch)
    plain = SeededSampler(10, None, 2, lambda: epoch)
    for kind in (sampler, plain):
        epoch = 0
        first = list(kind)
        assert list(kind) == first
        epoch = 1
        assert sorted(first) == sorted(kind) == list(range(len(kind)))
        assert list(kind) != first


def test_batches_of_like_lengths_come_in_no_order_of_length():
    lengths = torch.randint(3, 60, (1003,), generator=torch.Generator().manual_seed(5)).tolist()
    sampler = SeededSampler(1003, lengths, 10, lambda: 3, mixed=True)
    order = list(sampler)
    assert list(sampler) == order
    batches = [[lengths[row] for row in order[at : at + 10]] for at in range(0, 1003, 10)]
    assert max(lengths) in batches[0]
    assert len(batches[-1]) == 3
    spreads = [max(batch) - min(batch) for batch in batches[1:-1]]
    assert sum(spreads) / len(spreads) < 5
    means = torch.tensor([sum(batch) / len(batch) for batch in batches[1:-1]])
    around = means - means.mean()
    assert (around[1:] * around[:-1]).mean().abs() < 0.25 * around.square().mean()


def test_a_single_batch_is_mixed_too():
    for rows, size in ((3, 3), (3, 8)):
        assert sorted(SeededSampler(rows, [5, 9, 7], size, lambda: 0, mixed=True)) == [0, 1, 2]


def test_keep_last_leaves_the_end(tiny_bert, rows, tokenizer, tmp_path):
    given = {"tokenizer": tokenizer, "precision": "fp32", "checkpoints": 2, "keep_last": True}
    model = model_of(tiny_bert)
    run_stage(model, None, STAGE, rows, tmp_path, **given)
    assert last_checkpoint(tmp_path).name == "checkpoint-32"
    said = []
    again = model_of(tiny_bert)
    run_stage(again, None, STAGE, rows, tmp_path, say=said.append, **given)
    assert said == ["resumed after step 32"]
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("changes", [{"scheduler": "constant"}, {"ema": 0.9}])
def test_a_part_of_an_epoch_ends_where_it_ended(changes, tiny_bert, rows, tokenizer, tmp_path):
    """Resumed after the last step there is no further one."""
    stage = replace(STAGE, epochs=0.5, **changes)
    given = {"tokenizer": tokenizer, "precision": "fp32", "keep_last": True}
    models = [model_of(tiny_bert), model_of(tiny_bert)]
    logs = [run_stage(model, None, stage, rows, tmp_path, **given) for model in models]
    assert logs[0][-1]["step"] == logs[1][-1]["step"] == 8
    first, again = map(state_of, models)
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_another_order_of_rows_is_refused(tiny_bert, rows, tokenizer, tmp_path):
    given = {"tokenizer": tokenizer, "train_sampling_strategy": "sequential"}
    with pytest.raises(DistillError, match="expected 'random' or 'group_by_length'"):
        run_stage(model_of(tiny_bert), None, STAGE, rows, tmp_path, **given)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
             "trainer_state.json"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_checkpoint_cut_off_is_passed_over(
    name, how, interrupted, tiny_bert, rows, tokenizer, tmp_path, checkpoints
):
    assert last_checkpoint(checkpoints).name == "checkpoint-8"
    file = checkpoints / "checkpoint-8" / name
    content = file.read_bytes()
    try:
        file.unlink() if how == "missing" else file.write_bytes(content[:-20])
        assert last_checkpoint(checkpoints).name == "checkpoint-4"
    finally:
        file.write_bytes(content)


@pytest.fixture(scope="module")
def checkpoints(tiny_bert, rows, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_stage(
        model_of(tiny_bert), None, STAGE, rows, folder, tokenizer=tokenizer, precision="fp32",
        max_steps=8, save_steps=4, keep_last=True,
    )  # fmt: skip
    return folder


def test_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None


class _ByIds(nn.Module):
    """Logits that say which row they belong to: class 1 where the first word is even."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))
        self.batches = []

    def forward(self, input_ids, attention_mask, labels=None):
        assert labels is None
        assert not self.training
        self.batches.append(tuple(input_ids.shape))
        even = (input_ids[:, 1] % 2 == 0).float()
        logits = torch.stack([0.5 - even, even - 0.5], dim=1) + self.zero
        return SequenceClassifierOutput(logits=logits)


def test_scores_belong_to_their_rows(rows, tokenizer):
    model = _ByIds().train()
    scores = evaluate(model, rows, tokenizer, batch_size=7)
    dev = rows.validation["validation"]
    expected = np.mean([(ids[1] % 2 == 0) == label for ids, label in
                        zip(dev["input_ids"], dev["labels"], strict=True)])  # fmt: skip
    assert 0.3 < expected < 0.7  # an order of its own would show
    assert scores["validation"]["accuracy"] == pytest.approx(expected)
    assert model.training
    widths = [width for _, width in model.batches]
    assert widths == sorted(widths)
    assert sum(size for size, _ in model.batches) == len(dev)


def test_evaluate_leaves_no_folder(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate(_ByIds(), rows, tokenizer)
    assert not list(tmp_path.iterdir())


def test_evaluate_takes_every_dev_set(rows, tokenizer):
    from dataclasses import replace

    dev = rows.validation["validation"]
    both = replace(rows, validation={"matched": dev, "mismatched": dev.select(range(10))})
    assert list(evaluate(_ByIds(), both, tokenizer)) == ["matched", "mismatched"]


@pytest.mark.parametrize("few", [5, 10_000])
def test_few_rows_of_the_dev_set_make_the_curve(
    few, rows, tiny_bert, tokenizer, tmp_path, monkeypatch
):
    scored, metrics = [], finetune.compute_metrics
    monkeypatch.setattr(finetune, "CURVE_ROWS", few)
    monkeypatch.setattr(finetune, "compute_metrics", lambda task: lambda found: (
        scored.append(len(found.predictions)), metrics(task)(found))[1])  # fmt: skip
    run_stage(
        model_of(tiny_bert), None, STAGE, rows, tmp_path, tokenizer=tokenizer, precision="fp32",
        max_steps=2, save_steps=2, eval_steps=1,
    )  # fmt: skip
    dev = rows.validation["validation"]
    assert scored == [min(few, len(dev))] * 2
    lengths = [len(ids) for ids in finetune._curve_rows(dev)["input_ids"]]
    every = sorted(len(ids) for ids in dev["input_ids"])
    assert lengths == (
        every if few > len(dev) else [every[i * len(dev) // few] for i in range(few)]
    )


def test_precision(monkeypatch):
    assert use_bf16("bf16")
    assert not use_bf16("fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(finetune, "_cpu_flags", lambda: "flags: avx512f amx_bf16 amx_tile")
    assert use_bf16("auto")
    monkeypatch.setattr(finetune, "_cpu_flags", lambda: "flags: avx512f avx512_bf16")
    assert use_bf16("auto")
    monkeypatch.setattr(finetune, "_cpu_flags", lambda: "flags: avx2 avx512f avx512_bf16_fp")
    assert not use_bf16("auto")
    with pytest.raises(DistillError, match="expected 'auto', 'bf16' or 'fp32'"):
        use_bf16("fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda *_: True)
    for capability in ((7, 5), (8, 0)):  # T4 emulates bf16, A100 has it
        given = {"major": capability[0], "minor": capability[1]}
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        properties = SimpleNamespace(**given)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_, p=properties: p)
        assert use_bf16("auto") == (capability >= (8, 0))


def test_freed_memory_is_given_back_all_along(tiny_bert, rows, tokenizer, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(freed, "release_freed", lambda: given.append(1))
    monkeypatch.setattr(freed, "EVERY", 10)
    log = run_stage(model_of(tiny_bert), None, STAGE, rows, tmp_path, tokenizer=tokenizer)
    assert len(given) == log[-1]["step"] // 10 > 1


def test_frozen_student_is_refused(tiny_bert, rows, tokenizer, tmp_path):
    teacher = model_of(tiny_bert)
    student = model_of(tiny_bert).requires_grad_(False)
    stage = Stage(
        name="task", objective=Objective(terms=(Term(tap="logits"),)), learning_rate=1e-3, epochs=1
    )
    with pytest.raises(DistillError, match=r"nothing would be learnt.*requires_grad_\(True\)"):
        run_stage(student, teacher, stage, rows, tmp_path / "run", tokenizer=tokenizer)
    assert teacher.classifier.weight.requires_grad  # and nothing was changed


def test_log_is_json(tiny_bert, rows, tokenizer, tmp_path):
    log = run_stage(
        model_of(tiny_bert), None, STAGE, rows, tmp_path, tokenizer=tokenizer, precision="fp32",
        max_steps=4,
    )  # fmt: skip
    assert json.loads(json.dumps(log)) == log
    assert {"eval_accuracy", "eval_loss"} <= {key for row in log for key in row}


def test_commonest_class_is_what_a_constant_model_scores():
    """The commonest of train, scored on dev: 3 of 4 train rows are "yes", 1 of 4 dev rows."""
    task = Task(
        name="toy", text=("text",), labels=("no", "yes"), metrics=("accuracy", "f1"), primary="f1"
    )
    rows = TaskData(
        task=task,
        train=datasets.Dataset.from_dict({"labels": [1, 1, 1, 0]}),
        validation={"validation": datasets.Dataset.from_dict({"labels": [0, 0, 1, 0]})},
        source="",
    )
    found = commonest_class(rows)
    assert found == {"validation": pytest.approx({"accuracy": 0.25, "f1": 0.4})}
    scores = replace(task, labels=None, metrics=("pearson",), primary="pearson")
    assert commonest_class(replace(rows, task=scores)) is None


def test_a_stage_in_bf16_leaves_the_model_its_own_forward(tiny_bert, rows, tokenizer, tmp_path):
    model, fresh = model_of(tiny_bert), model_of(tiny_bert)
    stage = replace(STAGE, epochs=0.2)
    run_stage(model, None, stage, rows, tmp_path / "run", tokenizer=tokenizer, precision="bf16")
    fresh.load_state_dict(model.state_dict())
    for name, dev in answers(fresh, rows, tokenizer).items():
        after = answers(model, rows, tokenizer)[name].predictions
        assert np.array_equal(after, dev.predictions)
    assert "forward" not in vars(model)


def test_every_stage_in_bf16_trains_under_autocast(tiny_bert, rows, tokenizer, tmp_path):
    """accelerate marks the model of the first one, and wraps no marked one."""
    model = model_of(tiny_bert)
    seen = []
    model.classifier.register_forward_hook(
        lambda layer, given, out: seen.append(out.dtype) if model.training else None
    )
    for number, precision in enumerate(("bf16", "bf16", "fp32", "bf16")):
        seen.clear()
        run_stage(model, None, replace(STAGE, epochs=0.2), rows, tmp_path / str(number),
                  tokenizer=tokenizer, precision=precision)  # fmt: skip
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert not any("accelerate" in name for name in vars(model))


def test_another_stages_checkpoints_are_not_gone_on_from(tiny_bert, rows, tokenizer, tmp_path):
    run = tmp_path / "run"
    given = {"tokenizer": tokenizer, "precision": "fp32", "keep_last": True}
    run_stage(model_of(tiny_bert), None, STAGE, rows, run, **given)
    other = replace(STAGE, learning_rate=STAGE.learning_rate / 2, epochs=3)
    with pytest.raises(DistillError, match=r"of another stage \(other learning_rate, epochs\)"):
        run_stage(model_of(tiny_bert), None, other, rows, run, **given)
    fewer = replace(rows, train=rows.train.select(range(32)))
    with pytest.raises(DistillError, match=r"of another stage \(other rows\)"):
        run_stage(model_of(tiny_bert), None, STAGE, fewer, run, **given)
    student = kronbert.convert(model_of(tiny_bert), rules={"re:.*query": {"rank": 2}})
    with pytest.raises(DistillError, match=r"of another stage \(other student\)"):
        run_stage(student, None, STAGE, rows, run, **given)
    with pytest.raises(DistillError, match=r"of another stage \(other arguments\)"):
        run_stage(model_of(tiny_bert), None, STAGE, rows, run, **given, max_steps=3)
    run_stage(model_of(tiny_bert), None, STAGE, rows, run, **given, logging_steps=1)
    (run / "asked.json").unlink()  # as before they were noted
    run_stage(model_of(tiny_bert), None, STAGE, rows, run, **given)
    shutil.rmtree(run)
    run_stage(model_of(tiny_bert), None, other, rows, run, **given | {"keep_last": False})
    assert not (run / "asked.json").exists()


def test_a_run_goes_on_in_its_own_precision_on_another_machine(
    interrupted, tiny_bert, rows, tokenizer, tmp_path, monkeypatch
):
    given = {"tokenizer": tokenizer, "checkpoints": 8}
    whole = model_of(tiny_bert)
    run_stage(whole, None, STAGE, rows, tmp_path / "a", precision="bf16", **given)
    monkeypatch.setattr(finetune, "_cpu_flags", lambda: "avx512_bf16")
    interrupted(6, model_of(tiny_bert), None, STAGE, rows, tmp_path / "b", **given)
    monkeypatch.setattr(finetune, "_cpu_flags", lambda: "")
    with pytest.raises(DistillError, match=r"\(other precision\)"):
        run_stage(model_of(tiny_bert), None, STAGE, rows, tmp_path / "b", precision="fp32", **given)
    again = model_of(tiny_bert)
    run_stage(again, None, STAGE, rows, tmp_path / "b", **given)
    for name, value in state_of(whole).items():
        assert torch.equal(again.state_dict()[name], value), name
