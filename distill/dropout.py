"""Dropout of a student for the length of one stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

ENDINGS = ("dropout", "dropout_prob")
"""Of the names under which modules without a `nn.Dropout` keep its probability: ``dropout`` (BART,
XLM), ``attention_dropout`` (ModernBERT), ``dropout_prob`` (ViT)."""


@contextmanager
def dropout_set_to(model: nn.Module, p: float | None) -> Iterator[None]:
    """Within it every dropout of ``model`` drops with probability p; None changes nothing."""
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules() if p is not None else ():
        own = [name for name in vars(module) if name.endswith(ENDINGS)]
        for name in ["p"] if isinstance(module, _DropoutNd) else own:
            held = getattr(module, name)
            # a config.json may say 0 for 0.0
            if isinstance(held, int | float) and not isinstance(held, bool):
                before.append((module, name, held))
                setattr(module, name, p)
    try:
        yield
    finally:
        for module, name, held in before:
            setattr(module, name, held)
