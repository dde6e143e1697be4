"""Launches of the fused-layer kernels to compile ahead of time: `aot.py` takes them from here."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kronbert.kernels import ffn, linear_norm, norm
from kronbert.presets import PRESETS
from kronbert.shapes import KroneckerShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEVERAL_TERMS = ("4:2x16*384x192", "2:2x2*512x512", "2:2x4*384x192", "4:512x64*2x16")
"""Layers of which every term's big matrix has a part in shared memory."""

PATHS: tuple[ffn.Path, ...] = ("phases", "whole")
ROWS = 1024


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def dropped(p: float) -> dict[str, Any]:
    """Training drops and keeps, evaluation does neither."""
    seed = empty(1, dtype=torch.int64) if p else None
    return {"p": p, "seed": seed, "keep": p > 0}


def matrices(shape: KroneckerShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = empty(shape.rank, shape.a_out, shape.a_in, dtype=dtype)
    return a, empty(shape.rank, shape.b_out, shape.b_in, dtype=dtype)


def residual_norm(width: int, p: float, dtype: torch.dtype) -> None:
    x = empty(ROWS, width, dtype=dtype)
    weight = empty(width, dtype=dtype)
    drop = dropped(p)
    out: Any = norm.residual_norm(x, x, weight, weight, 1e-12, **drop)
    if drop.pop("keep"):
        norm.residual_norm_backward(
            x, out.total, out.mean, out.rstd, weight, **drop, has_shift=True
        )
    else:
        mean = empty(ROWS, dtype=torch.float32)
        norm.residual_norm_backward(x, x, mean, mean, weight)


def linear(shape: KroneckerShape, p: float, dtype: torch.dtype) -> None:
    x, weight = empty(ROWS, shape.in_features, dtype=dtype), empty(shape.out_features, dtype=dtype)
    residual = empty(ROWS, shape.out_features, dtype=dtype)
    rest: Any = (weight, residual, weight, weight, 1e-12)
    linear_norm.linear_norm(x, *matrices(shape, dtype), *rest, **dropped(p))


def slices(rank: int, s_out: int, g_out: int, g_in: int) -> None:
    like = {"dtype": torch.bfloat16}
    u, b = empty(ROWS, s_out, rank, g_in, **like), empty(rank, g_out, g_in, **like)
    residual, weight = empty(ROWS, s_out * g_out, **like), empty(s_out * g_out, **like)
    linear_norm.slices_norm(u, b, weight, residual, weight, weight, 1e-12)


def feed_forward(
    expand: KroneckerShape,
    contract: KroneckerShape,
    activation: str,
    path: ffn.Path,
    p: float,
    dtype: torch.dtype,
) -> None:
    x, weight = empty(ROWS, expand.in_features, dtype=dtype), empty(expand.in_features, dtype=dtype)
    (a1, b1), (a2, b2) = matrices(expand, dtype), matrices(contract, dtype)
    bias1 = empty(expand.out_features, dtype=dtype)
    drop = dropped(p)
    out: Any = ffn.ffn_norm(
        x,
        a1,
        b1,
        bias1,
        a2,
        b2,
        weight,
        weight,
        weight,
        1e-12,
        activation=activation,
        path=path,
        **drop,
    )
    if drop.pop("keep"):
        ffn.ffn_norm_backward(
            x,
            x,
            out.z,
            out.total,
            out.mean,
            out.rstd,
            a1,
            b1,
            bias1,
            a2,
            b2,
            weight,
            activation=activation,
            **drop,
        )


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What training BERT-base launches; with KRONBERT_AOT_ALL set every preset, width, dtype and
    activation, and evaluation too: 220 launches, 0.2 to 20 s each on one core."""
    everything = bool(os.environ.get("KRONBERT_AOT_ALL"))
    for spec in SEVERAL_TERMS if everything else SEVERAL_TERMS[:2]:
        shape = KroneckerShape.parse(spec)
        yield f"linear_norm {spec} bf16", functools.partial(linear, shape, 0.1, torch.bfloat16)
    yield "slices_norm 2x192 of 4:384x192 bf16", functools.partial(slices, 4, 2, 384, 192)
    for kind, dtype in DTYPES.items():
        for p in (0.0, 0.1) if everything else (0.1,):
            for width in (312, 384, 768, 4096) if everything else (768,):
                if everything or kind == "bf16":
                    call = functools.partial(residual_norm, width, p, dtype)
                    yield f"residual_norm {width} p={p} {kind}", call
            for width in (384, 768) if everything else (768,):
                for name in PRESETS if everything else ("k8", "k21"):
                    yield from linear_cases(name, width, p, kind, everything)
                    if everything or kind == "bf16":
                        yield from ffn_cases(name, width, p, kind, everything)


def linear_cases(
    name: str, width: int, p: float, kind: str, everything: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    preset, dtype = PRESETS[name], DTYPES[kind]
    shapes = [preset.attention.shape(width, width, name)]
    if not everything and kind != "bf16" and name != "k21":
        return
    if everything:
        shapes.append(preset.contract.shape(width, 4 * width, name))
    for shape in shapes:
        if linear_norm.fits(shape, dtype):
            call = functools.partial(linear, shape, p, dtype)
            yield f"{name} linear_norm {shape} p={p} {kind}", call


def ffn_cases(
    name: str, width: int, p: float, kind: str, everything: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    preset, dtype = PRESETS[name], DTYPES[kind]
    expand = preset.expand.shape(4 * width, width, name)
    contract = preset.contract.shape(width, 4 * width, name)
    if not ffn.fits(expand, contract):
        return
    for activation in ("gelu", "gelu_fast") if everything else ("gelu",):
        for path in PATHS:
            wanted = everything or path == "phases" or name == "k21"
            if wanted and (path == "phases" or ffn.fits_whole(expand, contract, dtype)):
                call = functools.partial(feed_forward, expand, contract, activation, path, p, dtype)
                yield f"{name} {path} {expand} {activation} p={p} {kind}", call
