"""Scores in any unit: a head is fine-tuned on standardised ones and then given their unit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from kronbert.distill.data import TaskData
from kronbert.distill.score_head import output_layer
from kronbert.errors import DataError


def scale_of(data: TaskData) -> tuple[float, float]:
    """Mean and standard deviation of the training rows' scores. `DataError` where all are equal."""
    column = "labels" if "labels" in data.train.column_names else data.task.label
    scores = np.asarray(data.train[column], dtype=np.float64)
    if not np.ptp(scores):
        raise DataError(
            f"{data.source}: every score of the training rows is {scores[0]:g}: there is nothing "
            "to learn."
        )
    return float(scores.mean()), float(scores.std())


def standardised(rows: TaskData, mean: float, deviation: float) -> TaskData:
    """Tokenised ``rows`` with labels of mean 0 and deviation 1, if these are the training rows'."""

    def scaled(part: datasets.Dataset) -> datasets.Dataset:
        def change(some: dict[str, Any]) -> dict[str, Any]:
            return {"labels": [(score - mean) / deviation for score in some["labels"]]}

        return part.map(change, batched=True, features=part.features, desc="Standardising")

    validation = {name: scaled(part) for name, part in rows.validation.items()}
    return replace(rows, train=scaled(rows.train), validation=validation)


@torch.no_grad()
def take_unit(model: nn.Module, mean: float, deviation: float) -> None:
    """``model``, which gives standardised scores, gives them in their unit from now on."""
    layer = output_layer(model)
    if layer is None:
        raise TypeError(f"{type(model).__name__}: no output layer to scale")
    layer.weight.mul_(deviation)
    layer.bias.mul_(deviation).add_(mean)
