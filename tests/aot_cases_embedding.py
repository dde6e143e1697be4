"""Launches of `kernels/embedding.py`: tables of the presets, a truncated SVD, dense ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kronbert.kernels.embedding import Inputs, Table, embed_norm, embed_norm_backward

BATCH, TOKENS = 32, 128


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def case(a: tuple[int, ...], b: tuple[int, ...] | None, dtype: torch.dtype, whole: bool) -> None:
    """Forward and backward of what BERT looks up, or of the words alone without LayerNorm."""
    ids = meta(BATCH * TOKENS, dtype=torch.int64)
    width = a[-1] * (b[-1] if b else 1)
    given = Inputs(
        ids, meta(30522, *a, dtype=dtype), meta(*b, dtype=dtype) if b else None, padding_idx=0
    )
    if whole:
        vector = meta(width, dtype=dtype)
        position = Table(meta(TOKENS, dtype=torch.int64), meta(512, width, dtype=dtype))
        kind = Table(ids, meta(2, width, dtype=dtype))
        given = replace(given, position=position, kind=kind, weight=vector, bias=vector)
    out, mean, rstd = embed_norm(given)
    embed_norm_backward(torch.empty_like(out), given, mean, rstd, (True,) * 6)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
        "k21 1x16": ((1, 48), (1, 1, 16)),
        "svd 64": ((64, 1), (64, 1, 768)),
        "svd 128, 1,024 wide": ((128, 1), (128, 1, 1024)),
        "svd 128, 1,000 wide": ((128, 1), (128, 1, 1000)),
        "dense 1,024": ((1024,), None),
        "k5 k19 1x12": ((1, 64), (1, 1, 12)),
        "k8 384 wide 1x8": ((1, 48), (1, 1, 8)),
        "4 terms 1x16": ((4, 48), (4, 1, 16)),
    }
    for dtype, count in ((torch.bfloat16, 8), (torch.float32, 5), (torch.float16, 1)):
        kind = str(dtype).removeprefix("torch.")
        for name, (a, b) in list(shapes.items())[:count]:
            yield f"embedding {name} {kind}", functools.partial(case, a, b, dtype, True)
        yield f"words only {kind}", functools.partial(case, (1, 48), (1, 1, 16), dtype, False)
