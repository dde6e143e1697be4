"""What accelerate leaves on a model that a Trainer has prepared: its autocast around ``forward``.

It also marks the model, and prepares no marked one again, so that a later Trainer would compute in
the precision of an earlier one; and copies carry both along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ORIGINAL = "_original_forward"
_LEFT = ("forward", _ORIGINAL, "_is_accelerate_prepared")


def unprepare(model: Any) -> None:
    """Give ``model`` back the forward that it had before it was prepared."""
    held = vars(model)
    held.pop("_is_accelerate_prepared", None)
    original = held.pop(_ORIGINAL, None)
    if original is None:
        return
    held.pop("forward", None)
    if getattr(original, "__func__", None) is not type(model).forward:
        model.forward = original


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Inside, ``model`` is one that was never prepared; afterwards it computes as before."""
    before = {name: vars(model)[name] for name in _LEFT if name in vars(model)}
    unprepare(model)
    try:
        yield
    finally:
        for name in _LEFT:
            vars(model).pop(name, None)
        vars(model).update(before)
