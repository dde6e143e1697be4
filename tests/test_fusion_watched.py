"""Fused blocks take the ordinary way where somebody watches or swaps a module."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.fusion_models import (
    CONFIGS,
    assert_same,
    gradients,
    scores,
    twins,
)


def watch(module: nn.Module, how: str, seen: Counter[str], name: str) -> Callable[[], Any]:
    """Count the calls of ``module`` under ``name``; returns what undoes it."""

    def hook(*args: Any) -> None:
        seen[name] += 1

    if how == "forward":
        return module.register_forward_hook(hook).remove
    if how == "pre":
        return module.register_forward_pre_hook(hook).remove
    if how == "backward":
        return module.register_full_backward_hook(hook).remove
    if how == "backward pre":
        return module.register_full_backward_pre_hook(hook).remove
    ordinary = module.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        seen[name] += 1
        return ordinary(*args, **kwargs)

    module.forward = own
    return lambda: vars(module).pop("forward")


@pytest.mark.filterwarnings("ignore:For backward hooks to be called", "ignore:Full backward hook")
@pytest.mark.parametrize("how", ["forward", "pre", "backward", "backward pre", "own forward"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_watched_module_is_called(name, how):
    """One module at a time, so that no other one's hook makes a block ordinary."""
    ours, plain = twins(name)
    backward = how.startswith("backward")
    expected = gradients(plain) if backward else scores(plain)
    counts: list[Counter[str]] = []
    for model in (ours, plain):
        seen: Counter[str] = Counter()
        for where, module in model.named_modules():
            if where and not isinstance(module, nn.ModuleList):
                undo = watch(module, how, seen, where)
                assert_same(gradients(model) if backward else scores(model), expected)
                undo()
        counts.append(seen)
    assert counts[0] == counts[1]
    assert counts[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_swapped_module_is_called(name):
    """An adapter put around a module after fusing, as adapter libraries do."""

    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, attribute: str) -> Any:  # a careless reader finds all of inner's
            try:
                return super().__getattr__(attribute)
            except AttributeError:
                return getattr(super().__getattr__("inner"), attribute)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = self.inner(*args, **kwargs)
            return (found[0] * 1.5, *found[1:]) if isinstance(found, tuple) else found * 1.5

    ours, plain = twins(name)
    before = scores(plain)
    changed = 0
    for where, module in list(plain.base_model.named_modules()):
        # No one output to scale, or none that counts.
        if isinstance(module, nn.ModuleList) or where in ("", "encoder", "transformer"):
            continue
        if where.startswith(("pooler", "rotary")):
            continue
        found = []
        for model in (ours, plain):
            inner = model.base_model.get_submodule(where)
            model.base_model.set_submodule(where, Adapter(inner))
            found.append(scores(model))
            model.base_model.set_submodule(where, inner)
        assert_same(found[0], found[1])
        changed += not torch.equal(found[1], before)
    assert changed > 12
