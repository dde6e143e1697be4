"""A teacher's cache without a job around it: runs side by side, other Trainers, layers, formats."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from kronbert.distill import DistillArguments, DistillTrainer, Objective, Term
from kronbert.distill.finetune import run_stage
from kronbert.distill.teacher_cache import TEACHER_LOGITS, WithStates, with_teacher
from kronbert.errors import DistillError
from tests.small_teacher import STAGE, a_teacher, model_of, with_teacher_logits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_runs_beside_one_another(tiny_bert, rows, tokenizer, tmp_path, calls):
    """The second waits for the first, and reads what it has written."""
    alone = with_teacher_logits(
        rows.train, a_teacher(tiny_bert), tmp_path / "a", tokenizer=tokenizer
    )
    calls.clear()
    found, teachers = {}, [a_teacher(tiny_bert) for _ in range(2)]
    began = threading.Event()

    def slowly(*_):
        began.set()
        time.sleep(0.1)

    teachers[0].register_forward_pre_hook(slowly)

    def run(name, teacher):
        found[name] = with_teacher_logits(
            rows.train, teacher, tmp_path / "b", tokenizer=tokenizer, batch_size=32
        )

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(teachers)]
    threads[0].start()
    began.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert len(calls) == 8
    for one in found.values():
        assert np.allclose(one[TEACHER_LOGITS], alone[TEACHER_LOGITS], atol=1e-5)


def test_a_teacher_that_a_trainer_has_prepared_answers_in_its_own_precision(
    tiny_bert, rows, tokenizer, tmp_path
):
    plain, prepared = a_teacher(tiny_bert), a_teacher(tiny_bert)
    Trainer(
        prepared,
        TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to="none"),
        eval_dataset=rows.train.select(range(8)),
        processing_class=tokenizer,
    ).evaluate()
    marks = {"forward", "_original_forward", "_is_accelerate_prepared"}
    assert marks <= set(vars(prepared))
    found, expected = (
        with_teacher_logits(rows.train, one, tmp_path / name, tokenizer=tokenizer)[TEACHER_LOGITS]
        for one, name in ((prepared, "a"), (plain, "b"))
    )
    assert found == expected
    assert marks <= set(vars(prepared))  # it is the caller's


def test_states_are_those_of_their_layers(tiny_bert, rows, tokenizer, tmp_path):
    """Kept of all layers, read by an objective of one; and refused where it has none."""
    teacher = a_teacher(tiny_bert)
    few = rows.train.select(range(16))
    student = model_of(tiny_bert)
    for parameter in student.parameters():
        parameter.data.mul_(1.5)
    objective = Objective(terms=(Term(tap="ffn"), Term(tap="logits", loss="kl")), layer_map=(0, 2))
    losses = []
    for layers in ((), (2,), (0, 1, 2), (0, 1)):
        taught, states = few, None
        if layers:
            taught, states = with_teacher(
                few, teacher, tmp_path, tokenizer=tokenizer, layers=layers
            )
        collate = DataCollatorWithPadding(tokenizer)
        trainer = DistillTrainer(
            student,
            DistillArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            teacher=a_teacher(tiny_bert),
            objective=objective,
        )
        batch = (WithStates(collate, states) if states else collate)(list(taught))
        if layers == (0, 1):
            with pytest.raises(DistillError, match=r"reads layer 2 of the teacher .*are of 0, 1:"):
                trainer.objective_losses([batch])
        else:
            losses.append(trainer.objective_losses([batch])["ffn"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)


def test_rows_of_tensors(tiny_bert, rows, tokenizer, tmp_path):
    """As datasets gives them after with_format("torch")."""
    tensors = replace(rows, train=rows.train.with_format("torch"))
    found = with_teacher_logits(tensors.train, a_teacher(tiny_bert), tmp_path, tokenizer=tokenizer)
    expected = with_teacher_logits(rows.train, a_teacher(tiny_bert), tmp_path, tokenizer=tokenizer)
    assert found.with_format(None)[TEACHER_LOGITS] == expected[TEACHER_LOGITS]
    models = [model_of(tiny_bert) for _ in range(2)]
    for model, data, name in zip(models, (tensors, rows), "ab", strict=True):
        run_stage(
            model, a_teacher(tiny_bert), STAGE, data, tmp_path / name / "run", tokenizer=tokenizer,
            precision="fp32", max_steps=3,
        )  # fmt: skip
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
