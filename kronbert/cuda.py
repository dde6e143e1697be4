"""The CUDA engine: the Triton kernels, where a GPU and the operands allow them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OLDEST = (8, 0)
"""Compute capability (Ampere) below which plain PyTorch runs: Triton's dot has no bfloat16 there."""


def takes(x: Tensor) -> bool:
    """Whether the kernels run products of x: on CUDA, of a known dtype, not while exporting.

    Where they do not (no Triton, an older GPU, float64), plain PyTorch runs and gives the same."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and not torch.compiler.is_exporting()
        and _supported(x.device.index or 0)
    )


def linear(x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None) -> Tensor:
    """x (..., in) with the groups ``pairs``: (..., out)."""
    from . import op_linear

    rows = x.reshape(-1, x.shape[-1])
    y = op_linear.kron_linear(rows, [a for a, _ in pairs], [b for _, b in pairs], bias, "")
    return y.view(*x.shape[:-1], y.shape[-1])


@cache
def _supported(device: int) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST
