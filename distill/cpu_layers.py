"""How a student's layers compute while it is trained on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kronbert import KroneckerLinear, NoMatchError, fuse, fused, unfuse


@contextmanager
def plain_attention(model: nn.Module, *, autocast: bool = False) -> Iterator[None]:
    """Within it a model on a CPU computes attention by plain products instead of torch's
    `scaled_dot_product_attention`; the same numbers, to rounding. Not where a `kronbert.fuse`d one
    has calls of its own: without ``autocast`` and dropout.

    torch 2.13's has a slow backward pass there, in bfloat16 above all: 103 ms a layer for 64
    sequences of 64 tokens and 12 heads of 32, so that a step of a MiniLM student took 1,339 ms and
    takes 715 (one core of a Xeon with AMX). Evaluation forward it is the quicker one."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    on_cpu = not torch.cuda.is_available()
    own = fused(model)
    dropped = any(one.p for one in model.modules() if isinstance(one, nn.Dropout))
    if own is not None and "qkv" in own.blocks.values() and not (dropped or autocast):
        yield
        return
    if before != "sdpa" or not on_cpu or not hasattr(model, "set_attn_implementation"):
        yield
        return
    settable: Any = model
    settable.set_attn_implementation("eager")
    try:
        yield
    finally:
        settable.set_attn_implementation(before)


@contextmanager
def fused_layers(model: nn.Module, *, autocast: bool) -> Iterator[None]:
    """Within it a model on a CPU whose layers are truncated SVDs is `kronbert.fuse`d; the same
    numbers, to rounding. With ``autocast`` nothing changes: only float32 has the calls that pay.

    Forward and backward of a MiniLM student on one thread of an AMD EPYC (Zen 3), beside other
    work, 8 / 19 times smaller: 1.16 / 1.26 times as fast on 32 rows of 53 tokens, 1.10 / 1.10 on 64
    of 13."""
    layers = [one for one in model.modules() if isinstance(one, KroneckerLinear)]
    low_rank = all(len(one.groups) == 1 and one.groups[0].low_rank for one in layers)
    ordinary = fused(model) is None
    if autocast or torch.cuda.is_available() or not (layers and low_rank and ordinary):
        yield
        return
    try:
        fuse(model)
    except NoMatchError:  # an architecture without fused blocks
        yield
        return
    try:
        yield
    finally:
        unfuse(model)
