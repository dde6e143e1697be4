"""Launches of a ModernBERT layer's kernels at base size to compile ahead of time: a sum with its
LayerNorm (768 wide, no bias), and the gate (1,152 hidden, of a map to 2,304)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kronbert.kernels import gated, norm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS, WIDTH, HIDDEN = 1024, 768, 1152


def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def dropped(p: float) -> dict[str, Any]:
    return {"p": p, "seed": empty(1, dtype=torch.int64) if p else None}


def add_norm(width: int, p: float, dtype: torch.dtype) -> None:
    """Evaluation, training, backward."""
    x, weight = empty(ROWS, width, dtype=dtype), empty(width, dtype=dtype)
    drop = dropped(p)
    norm.residual_norm(x, x, weight, None, 1e-5, **drop, total=True)
    out: Any = norm.residual_norm(x, x, weight, None, 1e-5, **drop, keep=True, total=True)
    kept = (out.total, out.mean, out.rstd, weight)
    norm.residual_norm_backward(x, *kept, added=x, **drop, has_bias=False)


def gate(hidden: int, activation: str, p: float, dtype: torch.dtype) -> None:
    pair, dy = empty(ROWS, 2 * hidden, dtype=dtype), empty(ROWS, hidden, dtype=dtype)
    gated.gated(pair, activation, **dropped(p))
    gated.gated_backward(dy, pair, activation, **dropped(p))


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """bfloat16 with and without dropout, the other dtypes without, as the model has it; with
    KRONBERT_AOT_ALL set every dtype both ways, ModernBERT-large's sizes and the fast GELU too."""
    everything = bool(os.environ.get("KRONBERT_AOT_ALL"))
    for kind, dtype in DTYPES.items():
        for p in (0.0, 0.1) if everything or kind == "bf16" else (0.0,):
            for width in (WIDTH, 1024) if everything else (WIDTH,):
                call = functools.partial(add_norm, width, p, dtype)
                yield f"add_norm {width} p={p} {kind}", call
            for hidden in (HIDDEN, 2624) if everything else (HIDDEN,):
                for activation in ("gelu", "gelu_fast") if everything else ("gelu",):
                    call = functools.partial(gate, hidden, activation, p, dtype)
                    yield f"gated {hidden} {activation} p={p} {kind}", call
