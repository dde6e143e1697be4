"""Which attention a student is trained with on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within it a model on a CPU computes attention by plain products instead of torch's
    `scaled_dot_product_attention`; the same numbers, to rounding.

    torch 2.13's has a slow backward pass there, in bfloat16 above all: 103 ms a layer for 64
    sequences of 64 tokens and 12 heads of 32, so that a step of a MiniLM student took 1,339 ms and
    takes 715 (one core of a Xeon with AMX). Evaluation forward it is the quicker one."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    on_cpu = not torch.cuda.is_available()
    if before != "sdpa" or not on_cpu or not hasattr(model, "set_attn_implementation"):
        yield
        return
    settable: Any = model
    settable.set_attn_implementation("eager")
    try:
        yield
    finally:
        settable.set_attn_implementation(before)
