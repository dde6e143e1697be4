"""Cases that `aot.py` must refuse, each for its own reason, beside some that it must pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _normalise(x, out, scale, N: tl.constexpr):
    """Holds N numbers in registers between two passes."""
    row = tl.program_id(0)
    values = tl.load(x + row * N + tl.arange(0, N)).to(tl.float32)
    values = tl.exp(values - tl.max(values, 0))
    values = values * scale / tl.sum(values, 0)
    tl.store(out + row * N + tl.arange(0, N), values.to(out.dtype.element_ty))


@triton.jit
def _multiply(x, y, out, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """A product whose loads wait in shared memory, num_stages of them."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(x + rows[:, None] * k + start + inner[None, :])
        right = tl.load(y + (start + inner)[:, None] * N + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + rows[:, None] * N + columns[None, :], total)


@triton.jit
def _broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), tl.zeros((N, 2), tl.float32))


def normalise(dtype: torch.dtype, **options: int) -> None:
    x = torch.empty(3, 1024, dtype=dtype, device="meta")
    _normalise[(3,)](x, torch.empty_like(x), 1.0, N=1024, num_warps=1, **options)


def multiply(num_stages: int) -> None:
    x = torch.empty(128, 1024, dtype=torch.bfloat16, device="meta")
    y = torch.empty(1024, 128, dtype=torch.bfloat16, device="meta")
    out = torch.empty(128, 128, device="meta")
    _multiply[(1,)](x, y, out, 1024, M=128, N=128, K=64, num_warps=8, num_stages=num_stages)


def broken() -> None:
    _broken[(1,)](torch.empty(16, device="meta"), N=16)


def raises() -> None:
    raise ValueError("the launcher's own words")


def cases() -> Iterator[tuple[str, Callable[[], Any]] | tuple[str, Callable[[], Any], Any]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    spilling = functools.partial(normalise, maxnreg=32)
    yield "fits", functools.partial(normalise, bf16)
    yield "fits again", functools.partial(normalise, bf16)
    yield "spills", functools.partial(spilling, bf16)
    yield "allowed", functools.partial(spilling, fp32), (1000, "to see it allowed")
    yield "allowed in half", functools.partial(spilling, fp16), (1000, "half precision may not")
    yield "no reason", functools.partial(normalise, fp32), (1000, " ")
    yield "shared fits", functools.partial(multiply, 3)
    yield "shared", functools.partial(multiply, 8)
    yield "broken", broken
    yield "raises", raises
    yield "idle", lambda: None
