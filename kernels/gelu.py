"""GELU and its derivative on a tile in registers: exact, and without special functions.

``gelu`` is torch's ``F.gelu`` (erf). ``gelu_fast`` is ``x * clamp(1/2 + x P(x²), 0, 1)``, P of
degree 6: eleven fp32 instructions and no special-function unit, where erf compiles to about 34.
It is within 1.7e-4 of the erf form over all reals, less than half a bfloat16 step at 0.1; its
derivative, that of the same form, is within 1e-2 of the exact one.
"""

import math
from typing import Literal

import triton
import triton.language as tl

from ..errors import ShapeError

Activation = Literal["gelu", "gelu_fast"] | None
ACTIVATIONS = (None, "gelu", "gelu_fast")

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))

# P minimises the largest |x (Phi(x) - 1/2 - x P(x²))| on [0, 3.94] (a linear programme), with
# x P(x²) >= 1/2 from there on: its leading coefficient is positive, so the clamp gives exactly 0
# and 1 in the tails however large x is.
P0 = tl.constexpr(3.98031563e-01)
P1 = tl.constexpr(-6.47775978e-02)
P2 = tl.constexpr(8.86643119e-03)
P3 = tl.constexpr(-8.33767466e-04)
P4 = tl.constexpr(5.00363458e-05)
P5 = tl.constexpr(-1.70562328e-06)
P6 = tl.constexpr(2.49190588e-08)
# d/dx of x² P(x²) is x Q(x²), Q_k = (2k + 2) P_k.
Q0 = tl.constexpr(2 * 3.98031563e-01)
Q1 = tl.constexpr(4 * -6.47775978e-02)
Q2 = tl.constexpr(6 * 8.86643119e-03)
Q3 = tl.constexpr(8 * -8.33767466e-04)
Q4 = tl.constexpr(10 * 5.00363458e-05)
Q5 = tl.constexpr(12 * -1.70562328e-06)
Q6 = tl.constexpr(14 * 2.49190588e-08)


def require_activation(where: str, activation: str | None) -> str:
    """The name a kernel takes as ``ACT``: "" for None. Raises `ShapeError` for any other name."""
    if activation not in ACTIVATIONS:
        raise ShapeError(
            f"{where}: activation={activation!r}: expected None, 'gelu' (erf) or 'gelu_fast'. "
            "Apply another activation to the result."
        )
    return activation or ""


@triton.jit
def gelu(x):
    """``x Phi(x)``: x fp32, any shape."""
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def gelu_grad(x):
    """``Phi(x) + x Phi'(x)``: x fp32, any shape."""
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * (DENSITY_AT_0 * tl.exp(-0.5 * x * x))


@triton.jit
def _fast_phi(x):
    """``1/2 + x P(x²)``, before the clamp."""
    t = x * x
    p = P6 * t + P5
    p = p * t + P4
    p = p * t + P3
    p = p * t + P2
    p = p * t + P1
    p = p * t + P0
    return x * p + 0.5


@triton.jit
def gelu_fast(x):
    """The polynomial form: x fp32, any shape."""
    return x * tl.minimum(tl.maximum(_fast_phi(x), 0.0), 1.0)


@triton.jit
def gelu_fast_grad(x):
    """The derivative of the polynomial form: 0 and 1 where it clamps."""
    t = x * x
    q = Q6 * t + Q5
    q = q * t + Q4
    q = q * t + Q3
    q = q * t + Q2
    q = q * t + Q1
    q = q * t + Q0
    phi = _fast_phi(x)
    return tl.where(phi >= 1.0, 1.0, tl.where(phi <= 0.0, 0.0, x * q + 0.5))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """x fp32 through the activation named by ACT: "" (none), "gelu" or "gelu_fast"."""
    if ACT == "gelu":
        return gelu(x)
    elif ACT == "gelu_fast":
        return gelu_fast(x)
    else:
        tl.static_assert(ACT == "" or ACT is None, "ACT: expected '', 'gelu' or 'gelu_fast'")
        return x


@triton.jit
def activate_grad(x, ACT: tl.constexpr):
    """The derivative of `activate` at x, fp32; 1 for none."""
    if ACT == "gelu":
        return gelu_grad(x)
    elif ACT == "gelu_fast":
        return gelu_fast_grad(x)
    else:
        tl.static_assert(ACT == "" or ACT is None, "ACT: expected '', 'gelu' or 'gelu_fast'")
        return tl.full(x.shape, 1.0, tl.float32)
