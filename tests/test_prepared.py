"""Models that a Trainer has prepared before: what is made of them has a precision of its own."""

import pytest
import torch
from transformers import AutoTokenizer, Trainer

import kronbert
from kronbert.distill import Objective, Term
from kronbert.distill.data import load_folder, tokenize
from kronbert.distill.finetune import answers
from kronbert.latency import compare_models
from kronbert.prepared import own_forward, unprepare
from tests.small_trainer import LABELS, LOGITS, a_dataset, a_model, a_trainer, arguments, collate

pytestmark = pytest.mark.usefixtures("one_thread")
LEFT = {"forward", "_original_forward", "_is_accelerate_prepared"}
RULES = {"re:.*(query|key|value|dense)": {"rank": 2}}


def dtypes(model, trainer):
    """Of the classifier's outputs while the trainer trains ``model``."""
    seen = set()
    hook = model.classifier.register_forward_hook(lambda layer, given, out: seen.add(out.dtype))
    trainer.train()
    hook.remove()
    return seen


def prepared(folder, bf16, teacher=None):
    """A teacher that transformers' Trainer has evaluated."""
    teacher = a_model(2) if teacher is None else teacher
    args = arguments(folder, bf16=bf16, remove_unused_columns=False)
    trainer = Trainer(teacher, args, eval_dataset=a_dataset(8), data_collator=collate)
    trainer.evaluate()
    assert "_is_accelerate_prepared" in vars(teacher)
    return teacher


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("now", [False, True])
def test_a_student_trains_in_its_trainers_precision(tmp_path, before, now):
    teacher = prepared(tmp_path, before)
    student = kronbert.convert(teacher, rules=RULES)
    wanted = {torch.bfloat16 if now else torch.float32}
    trainer = a_trainer(tmp_path, LOGITS, model=student, teacher=teacher, bf16=now, max_steps=2)
    seen = set()
    hook = teacher.classifier.register_forward_hook(lambda layer, given, out: seen.add(out.dtype))
    assert dtypes(student, trainer) == wanted
    assert seen == wanted
    hook.remove()
    # and by another trainer once more
    again = a_trainer(tmp_path, LOGITS, model=student, teacher=teacher, bf16=not now, max_steps=2)
    assert dtypes(student, again) == {torch.float32 if now else torch.bfloat16}
    assert dtypes(student, again) == {torch.float32 if now else torch.bfloat16}


def test_copies_are_unprepared(tmp_path):
    teacher = prepared(tmp_path, True)
    batch = collate(a_dataset(16))
    fitted = kronbert.convert(teacher, rules=RULES, init="data", calibration=[batch])
    expected = kronbert.convert(a_model(2), rules=RULES, init="data", calibration=[batch])
    for one in (fitted, kronbert.merge(fitted), kronbert.fewer_layers(teacher, 2)):
        assert vars(one).keys().isdisjoint(LEFT)
    assert torch.equal(fitted(**batch).logits, expected(**batch).logits)
    assert "_original_forward" in vars(teacher)  # it is the caller's
    inplace = kronbert.convert(teacher, rules=RULES, inplace=True)
    assert "_original_forward" not in vars(inplace)


def test_a_forward_of_the_callers_comes_back(tmp_path):
    model = a_model(1)
    ordinary, batch = model.forward, collate(a_dataset(4))

    def twice(*args, **kwargs):
        found = ordinary(*args, **kwargs)
        found.logits = 2 * found.logits
        return found

    model.forward = twice
    expected = model(**batch).logits
    with own_forward(model):
        assert model.forward is twice
    prepared(tmp_path, True, model)
    assert model.forward is not twice
    with own_forward(model):
        assert torch.equal(model(**batch).logits, expected)
    assert model.forward is not twice
    unprepare(model)
    assert model.forward is twice


def test_what_is_measured_afterwards_is_float32(tmp_path, tiny_bert, tiny_task):
    """Scores, times and another trainer's evaluation, before it has trained."""
    student = a_model(2, vocab_size=2000, max_position_embeddings=64)
    a_trainer(tmp_path, LABELS, model=student, bf16=True, max_steps=2).train()
    assert "_original_forward" in vars(student)
    seen = []
    student.classifier.register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    answers(student, tokenize(load_folder(tiny_task), tokenizer), tokenizer)
    batch = collate(a_dataset(2))
    compare_models({"student": student}, batch, 2, seconds=0.01, rounds=5)
    assert "_original_forward" in vars(student)
    again = a_trainer(
        tmp_path, LABELS, model=student, bf16=False, eval_strategy="no", eval_dataset=a_dataset(8)
    )
    again.evaluate()
    again.predict(a_dataset(8))
    assert set(seen) == {torch.float32}


def test_labels_that_only_the_teacher_would_read(tmp_path):
    """A bare student's rows may have labels: a teacher with a head is not asked for its loss."""
    from transformers import BertForMaskedLM, BertModel

    objective = Objective(terms=(Term(tap="embedding"), Term(tap="ffn")))
    for teacher in (a_model(2, BertForMaskedLM), a_model(2, num_labels=1)):
        trainer = a_trainer(
            tmp_path, objective, model=a_model(1, BertModel), teacher=teacher, max_steps=2,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 2
