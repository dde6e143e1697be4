"""A DistillTrainer for small BERTs: models, data whose rule can be learnt, what was logged."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from kronbert.distill import DistillArguments, DistillTrainer, Objective, Term
from kronbert.distill.recipes.kroneckerbert import task_objective

TASK = task_objective()
LABELS = Objective(terms=(Term(tap="labels"),))
LOGITS = Objective(terms=(Term(tap="logits", loss="kl", temperature=2.0), Term(tap="labels")))


def a_config(**changes: Any) -> BertConfig:
    given: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,  # models of different seeds differ visibly
    }
    return BertConfig(**given | changes)


def a_model(seed: int, cls: Any = BertForSequenceClassification, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return cls(a_config(**changes))


def a_dataset(rows: int = 64, tokens: int = 10, ragged: bool = False) -> list[dict[str, Any]]:
    """Rows whose label says whether the first word is below 20."""
    draw = np.random.default_rng(0)
    out = []
    for _ in range(rows):
        n = int(draw.integers(4, tokens + 1)) if ragged else tokens
        ids = [int(i) for i in draw.integers(3, 40, n)]
        row = {"input_ids": ids, "attention_mask": [1] * n, "token_type_ids": [0] * n}
        out.append(row | {"labels": int(ids[1] < 20)})
    return out


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows])
        for key in ("input_ids", "attention_mask", "token_type_ids")
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def masked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = collate(rows)
    labels = batch["input_ids"].clone()
    labels[:, 1::2] = -100
    batch["input_ids"][:, 0::2] = 1
    return batch | {"labels": labels}


def arguments(folder: Path, **changes: Any) -> DistillArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return DistillArguments(**given | changes)


def a_trainer(folder: Path, objective: Objective = TASK, **changes: Any) -> DistillTrainer:
    given: dict[str, Any] = {
        "model": a_model(1),
        "teacher": a_model(2),
        "train_dataset": a_dataset(),
        "data_collator": collate,
    }
    fields = DistillArguments.__dataclass_fields__
    given |= {name: changes.pop(name) for name in list(changes) if name not in fields}
    return DistillTrainer(args=arguments(folder, **changes), objective=objective, **given)


def logged(trainer: DistillTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}
