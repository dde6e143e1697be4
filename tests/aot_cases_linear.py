"""Launches of the linear kernels to compile ahead of time: every preset's shapes at BERT-base's
size, the other families, three maps at once, and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from kronbert.kernels.gelu import Activation
from kronbert.kernels.linear import linear, qkv
from kronbert.kernels.linear_backward import linear_backward
from kronbert.presets import PRESETS
from kronbert.shapes import KroneckerShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 4096


def tensors(
    spec: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a, b, bias without data."""
    shape = KroneckerShape.parse(spec)
    sizes = (
        (ROWS, shape.in_features),
        (shape.rank, shape.a_out, shape.a_in),
        (shape.rank, shape.b_out, shape.b_in),
        (shape.out_features,),
    )
    x, a, b, bias = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    return x, a, b, bias


def forward(spec: str, dtype: torch.dtype, activation: Activation) -> None:
    x, a, b, bias = tensors(spec, dtype)
    linear(x, [a], [b], bias, activation)


def three(spec: str, dtype: torch.dtype) -> None:
    x, a, b, bias = tensors(spec, dtype)
    qkv(x, [a] * 3, [b] * 3, [bias] * 3)


def backward(spec: str, dtype: torch.dtype, activation: Activation) -> None:
    x, a, b, bias = tensors(spec, dtype)
    linear_backward(x.new_empty(ROWS, bias.numel()), x, [a], [b], bias, activation)


def mixed(dtype: torch.dtype) -> None:
    """A sum of two groups: the first launch writes float32, the second adds it."""
    x, a, b, bias = tensors("16x2*192x384", dtype)
    _, u, v, _ = tensors("64:3072x1*1x768", dtype)
    linear(x, [a, u], [b, v], bias, "gelu")


OTHERS = ("48x48*16x16", "24x24*16x16", "96x96*8x8", "30x20*21x5", "64:768x1*1x768", "384x24*2x32")


TRAINED: dict[str, Activation] = {
    "384x48*2x16": None,
    "16x2*192x384": "gelu",
    "2x16*384x192": None,
    "384x384*2x2": None,
    "2x8*384x384": None,
    "4:384x384*8x2": "gelu",
    "48x48*16x16": None,
}
"""Spec -> activation, for backward."""


def shapes() -> dict[str, Activation]:
    """Spec of every preset's layer -> activation that follows it."""
    found: dict[str, Activation] = {}
    for preset in PRESETS.values():
        found[preset.attention.shape(768, 768, "attention").spec] = None
        found[preset.expand.shape(3072, 768, "expand").spec] = "gelu"
        found[preset.contract.shape(768, 3072, "contract").spec] = None
    return found


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    attention = {p.attention.shape(768, 768, "attention").spec for p in PRESETS.values()}
    for name, dtype in DTYPES.items():
        for spec, activation in shapes().items():
            yield f"{spec} {name}", functools.partial(forward, spec, dtype, activation)
        for spec in sorted(attention):
            yield f"qkv {spec} {name}", functools.partial(three, spec, dtype)
        if name == "fp16":
            continue  # half precision once more would tell nothing that bfloat16 does not
        for spec in OTHERS:
            yield f"{spec} {name}", functools.partial(forward, spec, dtype, None)
        yield (
            f"fast 16x2*192x384 {name}",
            functools.partial(forward, "16x2*192x384", dtype, "gelu_fast"),
        )
        yield f"groups {name}", functools.partial(mixed, dtype)
        for spec, activation in TRAINED.items():
            yield f"backward {spec} {name}", functools.partial(backward, spec, dtype, activation)
