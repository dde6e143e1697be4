"""Which start of a student pays: short equal training of students of one size and structure.

    python examples/start_study.py --model FOLDER_OR_HUB --data-dir GLUE --teachers runs/study

As structure_study.py, whose options these are, with the planner's structure. "blocks" begins with
the fit to data, and half of the pass over the rows is one in which the embeddings and every layer
learn their own outputs, one after another; so all students read as many tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from structure_study import Task, work  # type: ignore[import-not-found]
from study_starts import by_importance, learn_blocks  # type: ignore[import-not-found]
from transformers import DataCollatorWithPadding

import kronbert
from kronbert.distill.finetune import training_rows

STARTS = ("weights", "data", "importance", "blocks")
"""weights, data: `kronbert.convert`'s init. importance: data, outputs counted by how much the
teacher's answers depend on them (`study_starts.by_importance`). blocks: data, and then
`study_starts.learn_blocks`."""


class Started(Task):
    """Students of the planner's structure, told apart by their starts."""

    study = "start"

    def begin(self, plan: Any, name: str, fit: Any, seed: int) -> tuple[Any, float]:
        teacher = self.teacher
        if name == "weights":
            return kronbert.convert(teacher, plan=plan), 1.0
        if name == "importance":
            return by_importance(teacher, plan, fit), 1.0
        student = kronbert.convert(teacher, plan=plan, init="data", calibration=fit)
        if name == "data":
            return student, 1.0
        stage = self.stages[0]
        rows = training_rows(self.data, stage).shuffle(seed=seed)
        half = rows.select(range(len(rows) // 2))
        learn_blocks(student, teacher, padded(half, stage.batch_size, self.tokenizer), stage)
        return student, 0.5


def padded(rows: Dataset, size: int, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Batches of rows of similar length, in a random order, without labels."""
    collate = DataCollatorWithPadding(tokenizer)
    names = [name for name in rows.column_names if name in tokenizer.model_input_names]
    plain = rows.select_columns(names)
    lengths = [len(ids) for ids in plain["input_ids"]]
    order = sorted(range(len(plain)), key=lengths.__getitem__)
    starts = torch.randperm(-(-len(order) // size), generator=torch.Generator().manual_seed(0))
    return [
        dict(collate([plain[i] for i in order[start * size : (start + 1) * size]]))
        for start in starts.tolist()
    ]


if __name__ == "__main__":
    work(Started, STARTS)
