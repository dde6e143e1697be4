"""Runs of the main job on the tiny BERT: their settings, and what they leave."""

import torch
from transformers import AutoModelForSequenceClassification

from kronbert.job import CompressSettings

# 16 rows a step, 256 rows: 16 steps an epoch.
SHORT = {"teacher_epochs": 3, "teacher_learning_rate": 3e-3, "epochs": 4, "learning_rate": 3e-3,
         "batch_size": 16, "precision": "fp32", "splice": 0}  # fmt: skip


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


def task_of_classes(tmp_path, classes):
    task = tmp_path / f"classes{classes}"
    task.mkdir(exist_ok=True)
    for name in ("train", "dev"):
        rows = [f"the film\tc{i % classes}" for i in range(12)]
        (task / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return task
