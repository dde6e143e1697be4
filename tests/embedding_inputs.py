"""What embedding kernels look up: tables of every kind, with ids that repeat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kronbert.kernels.embedding import Inputs, Table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

# a (rank, a_in), b_in; None: a dense table.
SHAPES: dict[str, Any] = {
    "k5 and k19": ((1, 64), 12),
    "k8": ((1, 96), 8),
    "k21": ((1, 48), 16),
    "three terms": ((3, 24), 16),
    "svd": ((5, 1), 384),
    "svd on tensor cores": ((20, 1), 384),
    "many terms": ((11, 3), 7),
    "large b": ((2, 3), 100),
    "odd": ((2, 7), 5),
    "dense": ((1, 384), None),
    "dense odd": ((1, 39), None),
    "dense 1,024": ((1, 1024), None),
}


def make(shape: str, n: int, dtype: torch.dtype, entries: int = 23, **changes: Any) -> Inputs:
    """`Inputs` with every table; ids that repeat, one of them more often than a chunk is long."""
    (rank, a_in), b_in = SHAPES[shape]
    width = a_in * (b_in or 1)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE).to(dtype)

    ids = torch.randint(0, entries, (n,), device=DEVICE)
    ids[n // 3 : n // 2] = 4
    period = n // 3 if n % 3 == 0 else n
    given: dict[str, Any] = {
        "ids": ids,
        "a": random(entries, rank, a_in) if b_in else random(entries, width),
        "b": random(rank, 1, b_in) if b_in else None,
        "position": Table(torch.arange(period, device=DEVICE) % 13, random(13, width)),
        "kind": Table(ids.to(torch.int32) % 2, random(2, width)),
        "weight": random(width),
        "bias": random(width),
        "eps": EPS,
    }
    return Inputs(**{**given, **changes})
