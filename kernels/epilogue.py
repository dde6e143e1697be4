"""What follows a product in registers: partial sums, bias, activation, the store."""

# ruff: noqa: RUF005  -- Triton's tuples grow by +, they have no unpacking

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .gelu import activate, activate_grad


@triton.jit
def finish(
    v,
    rows,
    columns,
    mask,
    partial_ptr,
    bias_ptr,
    dy_ptr,
    y_ptr,
    OUT: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
):
    """Store ``act(v + partial + bias)``, or with GRAD ``dy * act'(v + partial + bias)``.

    v fp32; rows (int64) and columns broadcast to v's shape, as mask does; partial (n, OUT) fp32,
    dy and y (n, OUT). A pointer whose flag is off is never read."""
    at = rows * OUT + columns
    if ADD:
        v += tl.load(partial_ptr + at, mask=mask, other=0.0)
    if BIAS:
        v += tl.load(bias_ptr + columns, mask=columns < OUT, other=0.0).to(tl.float32)
    if GRAD:
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = dy * activate_grad(v, ACT)
    else:
        v = activate(v, ACT)
    tl.store(y_ptr + at, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pick(first, second, third, index):
    """The one of three pointers that ``index`` (0, 1, 2) names."""
    if index == 0:
        chosen = first
    elif index == 1:
        chosen = second
    else:
        chosen = third
    return chosen


@triton.jit
def interleave(parts, COUNT: tl.constexpr):
    """COUNT (a power of two) tiles (m, n) -> (m, n * COUNT), part i in columns i + COUNT * k."""
    if COUNT == 1:
        return parts[0]
    else:
        even = ()
        odd = ()
        for i in tl.static_range(COUNT // 2):
            even = even + (parts[2 * i],)
            odd = odd + (parts[2 * i + 1],)
        pairs = tl.join(interleave(even, COUNT // 2), interleave(odd, COUNT // 2))
        return tl.reshape(pairs, (pairs.shape[0], pairs.shape[1] * 2))


@triton.jit
def deinterleave(x, COUNT: tl.constexpr):
    """The inverse of `interleave`: (m, n * COUNT) -> a tuple of COUNT tiles (m, n)."""
    if COUNT == 1:
        return (x,)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        even = deinterleave(even, COUNT // 2)
        odd = deinterleave(odd, COUNT // 2)
        parts = ()
        for i in tl.static_range(COUNT // 2):
            parts = parts + (even[i], odd[i])
        return parts


class Ending(NamedTuple):
    """What a launch does after its product; `finish` is the definition.

    bias: one (out,) per map, or None. partial: (n, out) fp32 to add first. dy (n, out): the result
    is ``dy * act'(...)``. act: "", "gelu" or "gelu_fast"."""

    bias: list[Tensor] | None = None
    partial: Tensor | None = None
    dy: Tensor | None = None
    act: str = ""

    def flags(self) -> dict[str, object]:
        """The constants ADD, BIAS, GRAD and ACT of a kernel."""
        return {
            "ADD": self.partial is not None,
            "BIAS": self.bias is not None,
            "GRAD": self.dy is not None,
            "ACT": self.act,
        }

    def pointers(self, ys: list[Tensor]) -> list[Tensor]:
        """bias x 3, y x 3, partial, dy; y stands for what is missing, since it is never read."""
        bias = three(self.bias) if self.bias is not None else [ys[0]] * 3
        partial = ys[0] if self.partial is None else self.partial
        return [*bias, *three(ys), partial, ys[0] if self.dy is None else self.dy]


def three(tensors: list[Tensor]) -> list[Tensor]:
    """Of one tensor or three: three, for a kernel with MAPS = 1 or 3."""
    return tensors if len(tensors) == 3 else tensors * 3
