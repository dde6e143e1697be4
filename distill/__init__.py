"""Distillation of converted models, on transformers' Trainer; names are imported when used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kronbert.distill import layer_maps, recipes
    from kronbert.distill.augmentation import augment
    from kronbert.distill.data import load_task, tokenize
    from kronbert.distill.objectives import Objective, Term
    from kronbert.distill.rate_search import RateSearch, search_rates
    from kronbert.distill.recipes import Recipe
    from kronbert.distill.splicing import splice
    from kronbert.distill.stages import Stage
    from kronbert.distill.taps import TapMap, Taps
    from kronbert.distill.tasks import compute_metrics
    from kronbert.distill.trainer import DistillArguments, DistillTrainer
    from kronbert.distill.unlabelled import unlabelled_rows, unlabelled_text, with_unlabelled

__all__ = [
    "DistillArguments",
    "DistillTrainer",
    "Objective",
    "RateSearch",
    "Recipe",
    "Stage",
    "TapMap",
    "Taps",
    "Term",
    "augment",
    "compute_metrics",
    "layer_maps",
    "load_task",
    "recipes",
    "search_rates",
    "splice",
    "tokenize",
    "unlabelled_rows",
    "unlabelled_text",
    "with_unlabelled",
]

_HOME = {
    "DistillArguments": "trainer",
    "DistillTrainer": "trainer",
    "Objective": "objectives",
    "RateSearch": "rate_search",
    "Recipe": "recipes",
    "Stage": "stages",
    "TapMap": "taps",
    "Taps": "taps",
    "Term": "objectives",
    "augment": "augmentation",
    "compute_metrics": "tasks",
    "load_task": "data",
    "search_rates": "rate_search",
    "splice": "splicing",
    "tokenize": "data",
    "unlabelled_rows": "unlabelled",
    "unlabelled_text": "unlabelled",
    "with_unlabelled": "unlabelled",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
