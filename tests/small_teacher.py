"""A teacher with answers that differ from row to row, and what a cache keeps of it."""

import torch
from transformers import AutoModelForSequenceClassification

from kronbert.distill import Objective, Stage, Term
from kronbert.distill.teacher_cache import with_teacher

SOFT = Objective(terms=(Term(tap="logits", loss="kl", temperature=2.0),))
STAGE = Stage(name="task", objective=SOFT, learning_rate=1e-3, epochs=1, batch_size=16,
              cache_teacher=True)  # fmt: skip


def with_teacher_logits(*args, **given):
    taught, states = with_teacher(*args, **given)
    assert states is None
    return taught


def model_of(folder, seed=1):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def a_teacher(folder):
    model = model_of(folder, 2)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return model
