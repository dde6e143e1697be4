"""Dropout of a student for the length of one stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

ATTRIBUTES = ("attention_dropout", "dropout_prob")
"""Where attention that has no `nn.Dropout` keeps its probability (ModernBERT, ViT, YOLOS)."""


@contextmanager
def dropout_set_to(model: nn.Module, p: float | None) -> Iterator[None]:
    """Within it every dropout of ``model`` drops with probability p; None changes nothing."""
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules() if p is not None else ():
        names = ("p",) if isinstance(module, nn.Dropout) else ATTRIBUTES
        for name in names:
            held = getattr(module, name, None)
            if isinstance(held, int | float):  # a config.json may say 0 for 0.0
                before.append((module, name, held))
                setattr(module, name, p)
    try:
        yield
    finally:
        for module, name, held in before:
            setattr(module, name, held)
