"""The moving average of a stage's weights: its values, where it is used, and after a power cut."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    TrainerCallback,
    TrainerState,
)

from kronbert.distill import DistillArguments, DistillTrainer, Objective, Stage, Term
from kronbert.distill.averaging import FILE, WeightAverage, decay_at
from kronbert.distill.checkpoints import last_checkpoint
from kronbert.distill.finetune import labels_only, run_stage
from kronbert.distill.trainer import DistillTrainer as Trainer
from kronbert.errors import DistillError

STAGE = Stage(
    name="task", objective=labels_only(), learning_rate=1e-3, epochs=1, batch_size=16, ema=0.9
)
STEPS = 16


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(folder):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.bert.embeddings.requires_grad_(False)
    return model


def weights(model):
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


class _Watch(TrainerCallback):
    """The weights that are trained, after every step; what an evaluation sees of one of them."""

    def __init__(self):
        self.steps, self.evaluated = [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(weights(model))

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.evaluated.append((state.global_step, weights(model)))


@pytest.fixture
def watched(monkeypatch):
    """Runs a stage; cut after a step if one is given. The callback of each run."""
    real = Trainer.train

    def run(*args, cut=None, **kwargs):
        watch = _Watch()

        def train(self, *a, **k):
            self.add_callback(watch)
            if cut is not None:
                self.add_callback(_Cut(cut))
            return real(self, *a, **k)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", train)
            if cut is None:
                run_stage(*args, **kwargs)
            else:
                with pytest.raises(KeyboardInterrupt):
                    run_stage(*args, **kwargs)
        return watch

    return run


class _Cut(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def expected(start, steps, decay):
    average = dict(start)
    for t, new in enumerate(steps, start=1):
        keep = min(decay, (1 + t) / (10 + t))
        average = {n: keep * average[n] + (1 - keep) * new[n] for n in new}
    return average


def test_decay_grows_to_its_value():
    assert decay_at(1, 0.99) == 2 / 11
    assert decay_at(10_000, 0.99) == 0.99


def test_the_student_is_the_average(watched, tiny_bert, rows, tokenizer, tmp_path):
    model = model_of(tiny_bert)
    start = weights(model)
    watch = watched(model, None, STAGE, rows, tmp_path, tokenizer=tokenizer, precision="fp32")
    assert len(watch.steps) == STEPS
    average = expected(start, watch.steps, 0.9)
    last = watch.steps[-1]
    moved = 0.0
    for name, value in weights(model).items():
        assert torch.allclose(value, average[name], atol=1e-6), name
        moved = max(moved, float((value - last[name]).abs().max()))
    assert moved > 1e-4  # the average is not the weights that were trained
    assert torch.equal(weights(model)["bert.embeddings.word_embeddings.weight"],
                       start["bert.embeddings.word_embeddings.weight"])  # fmt: skip


def test_what_is_unfrozen_before_training_is_averaged(tiny_bert, rows, tokenizer, tmp_path):
    model = model_of(tiny_bert)
    args = STAGE.to_arguments(
        tmp_path, max_steps=5, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    given = {"objective": STAGE.objective, "train_dataset": rows.train, "callbacks": [_Watch()]}
    trainer = DistillTrainer(model, args, teacher=None, processing_class=tokenizer, **given)
    model.bert.embeddings.requires_grad_(True)
    start = weights(model)
    trainer.train()
    average = expected(start, given["callbacks"][0].steps, 0.9)
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(average[name], start[name])
    assert torch.allclose(weights(model)[name], average[name], atol=1e-6)


def test_callbacks_see_what_training_leaves(tiny_bert, rows, tokenizer, tmp_path):
    class Last(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            self.seen = weights(model)

    model, last = model_of(tiny_bert), Last()
    args = STAGE.to_arguments(
        tmp_path, max_steps=5, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    DistillTrainer(
        model, args, teacher=None, processing_class=tokenizer, callbacks=[last],
        objective=STAGE.objective, train_dataset=rows.train,
    ).train()  # fmt: skip
    assert all(torch.equal(value, last.seen[name]) for name, value in weights(model).items())


def test_evaluations_have_the_average_and_training_goes_on_without(
    watched, tiny_bert, rows, tokenizer, tmp_path
):
    given = {"tokenizer": tokenizer, "precision": "fp32"}
    model = model_of(tiny_bert)
    start = weights(model)
    watch = watched(model, None, STAGE, rows, tmp_path / "a", **given)
    assert len(watch.evaluated) >= 8
    for step, seen in watch.evaluated:
        average = expected(start, watch.steps[:step], 0.9)
        for name, value in seen.items():
            assert torch.allclose(value, average[name], atol=1e-6), (step, name)
    plain = watched(
        model_of(tiny_bert), None, replace(STAGE, ema=None), rows, tmp_path / "b", **given
    )
    for with_average, without in zip(watch.steps, plain.steps, strict=True):
        assert all(torch.equal(with_average[n], without[n]) for n in without)


@pytest.mark.parametrize("cut", [3, 9])
def test_interruption_changes_no_average(cut, watched, tiny_bert, rows, tokenizer, tmp_path):
    given = {"tokenizer": tokenizer, "precision": "fp32", "checkpoints": 8}
    whole, other = model_of(tiny_bert), model_of(tiny_bert)
    run_stage(whole, None, STAGE, rows, tmp_path / "a", **given)
    watched(model_of(tiny_bert), None, STAGE, rows, tmp_path / "b", cut=cut, **given)
    said = []
    run_stage(other, None, STAGE, rows, tmp_path / "b", say=said.append, **given)
    assert said == [f"resumed after step {cut - 1}"]
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_the_end_can_be_resumed(tiny_bert, rows, tokenizer, tmp_path):
    given = {"tokenizer": tokenizer, "precision": "fp32", "keep_last": True}
    first, again = model_of(tiny_bert), model_of(tiny_bert)
    run_stage(first, None, STAGE, rows, tmp_path, **given)
    run_stage(again, None, STAGE, rows, tmp_path, **given)
    assert torch.equal(first.classifier.weight, again.classifier.weight)


def test_a_checkpoint_without_its_average_is_not_whole(tiny_bert, rows, tokenizer, tmp_path):
    run_stage(
        model_of(tiny_bert), None, STAGE, rows, tmp_path, tokenizer=tokenizer, precision="fp32",
        max_steps=4, save_steps=2, keep_last=True,
    )  # fmt: skip
    assert last_checkpoint(tmp_path, averaged=True).name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / FILE).write_bytes(b"{")
    assert last_checkpoint(tmp_path, averaged=True).name == "checkpoint-2"
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_run_passes_over_a_checkpoint_without_its_average(tiny_bert, rows, tokenizer, tmp_path):
    given = {"tokenizer": tokenizer, "precision": "fp32", "checkpoints": 8, "keep_last": True}
    whole, again = model_of(tiny_bert), model_of(tiny_bert)
    run_stage(whole, None, STAGE, rows, tmp_path, **given)
    (tmp_path / "checkpoint-16" / FILE).unlink()  # cut off after the checkpoint, before this file
    said = []
    run_stage(again, None, STAGE, rows, tmp_path, say=said.append, **given)
    assert said == ["resumed after step 14"]
    assert torch.equal(whole.classifier.weight, again.classifier.weight)


def test_frozen_weights_have_no_second_copy(tiny_bert, rows, tokenizer, tmp_path):
    model = model_of(tiny_bert)
    run_stage(
        model, None, STAGE, rows, tmp_path, tokenizer=tokenizer, precision="fp32", max_steps=1,
        keep_last=True,
    )  # fmt: skip
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(load_file(tmp_path / "checkpoint-1" / FILE)) == trained
    assert len(trained) < len(model.state_dict())


def a_trainer(folder, model, rows, **arguments):
    args = DistillArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", max_steps=2, save_steps=1,
        per_device_train_batch_size=1, disable_tqdm=True, **arguments,
    )  # fmt: skip
    return DistillTrainer(
        model, args, teacher=None, objective=labels_only(), train_dataset=rows.train
    )


def test_a_plain_trainer_resumes_too(tiny_bert, rows, tmp_path):
    model = model_of(tiny_bert)
    a_trainer(tmp_path, model, rows, ema=0.5).train()
    again = model_of(tiny_bert)
    shutil.rmtree(tmp_path / "checkpoint-2")
    trainer = a_trainer(tmp_path, again, rows, ema=0.5)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    (tmp_path / "checkpoint-2" / FILE).unlink()
    with pytest.raises(DistillError, match=r"no whole average\.safetensors.*saved without ema"):
        a_trainer(tmp_path, again, rows, ema=0.5).train(resume_from_checkpoint=True)


def test_another_students_average_is_refused(tiny_bert, tmp_path):
    average = WeightAverage(model_of(tiny_bert), 0.5)
    save_file({"x": torch.zeros(2)}, tmp_path / FILE)
    average.resumed_from = tmp_path
    with pytest.raises(DistillError, match="other parameters than the student trains"):
        average.on_train_begin(None, TrainerState(global_step=1), None)


def test_objective_losses_are_those_of_the_average(tiny_bert, rows, tokenizer, tmp_path):
    """Inside a run: the held-out curve is of the student that the run will leave."""
    teacher, student = model_of(tiny_bert), model_of(tiny_bert)
    trainer = DistillTrainer(
        student,
        DistillArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", ema=0.9),
        teacher=copy.deepcopy(teacher),
        objective=Objective(terms=(Term(tap="logits"),)),
    )
    batch = tokenizer.pad([{"input_ids": rows.train[0]["input_ids"]}], return_tensors="pt")
    trainer._average.on_train_begin(None, trainer.state, None)
    with torch.no_grad():
        student.classifier.bias += 5
    assert trainer.objective_losses([batch]) == {"logits": pytest.approx(0, abs=1e-8)}
    assert student.classifier.bias.mean() > 4


def test_predictions_inside_a_run_are_those_of_the_average(tiny_bert, rows, tmp_path):
    student = model_of(tiny_bert)
    trainer = a_trainer(tmp_path, student, rows, ema=0.9)
    one = rows.train.select([0])
    before = trainer.predict(one).predictions
    trainer._average.on_train_begin(None, trainer.state, None)
    with torch.no_grad():
        student.classifier.bias += 5
    inside = trainer.predict(one).predictions
    assert inside == pytest.approx(before, abs=1e-6)
    assert student.classifier.bias.mean() > 4


@pytest.mark.parametrize("ema", [0, 1, 1.5, "0.9"])
def test_what_is_no_decay(ema, tmp_path):
    with pytest.raises(DistillError, match=r"Stage\('task'\): ema=.*expected a share in \(0, 1\)"):
        replace(STAGE, ema=ema)
    with pytest.raises(DistillError, match="DistillArguments: ema="):
        DistillArguments(output_dir=str(tmp_path), ema=ema)


def test_best_checkpoint_and_average_exclude_each_other(tiny_bert, rows, tmp_path):
    with pytest.raises(DistillError, match="ema with load_best_model_at_end"):
        a_trainer(
            tmp_path, model_of(tiny_bert), rows, ema=0.9, load_best_model_at_end=True,
            eval_strategy="steps", eval_steps=1,
        )  # fmt: skip


def test_stage_survives_json():
    assert Stage.from_json(STAGE.to_json()) == STAGE
    assert "ema" in STAGE.to_dict()
