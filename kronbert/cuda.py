"""The CUDA engine: the Triton kernels, where the GPU and the operands allow them.

Where they do not (no Triton, a GPU of AMD or before Ampere, float64, exporting), `takes` says no
and plain PyTorch runs; it gives the same numbers to rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .shapes import Groups

if TYPE_CHECKING:
    from .blocks import Gelu, Lookup, Norm

Pairs = Sequence[tuple[Tensor, Tensor]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OLDEST = (8, 0)
"""Compute capability (Ampere) below which plain PyTorch runs: no bfloat16 in Triton's dot there."""


_TRITON = importlib.util.find_spec("triton") is not None
"""Asked here: torch.compile traces what is asked below, in torch 2.11 not this."""


def takes(x: Tensor) -> bool:
    """Whether the kernels run what is made from x."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and not torch.compiler.is_exporting()
        and _supported(x.device.index or 0)
    )


def linear(x: Tensor, pairs: Pairs, bias: Tensor | None) -> Tensor:
    """x (..., in) with the groups ``pairs``: (..., out)."""
    from . import op_linear

    return op_linear.kron_linear(x, [a for a, _ in pairs], [b for _, b in pairs], bias)


def qkv(
    x: Tensor, pairs: Pairs, bias: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Three maps of x, one group each; None unless they are of one shape."""
    from . import op_linear

    sizes = {(a.shape, b.shape) for a, b in pairs}
    given = [one for one in bias if one is not None]
    if len(sizes) > 1 or len(given) not in (0, 3):
        return None
    return op_linear.kron_qkv(x, [a for a, _ in pairs], [b for _, b in pairs], given)


def residual_norm(x: Tensor, residual: Tensor | None, norm: Norm, dropout: float) -> Tensor:
    """``LN(residual + dropout(x))``."""
    from . import op_norm

    return op_norm.residual_norm(x, residual, *norm, p=dropout, seed=_seed(x, dropout))


def add_norm(x: Tensor, residual: Tensor, norm: Norm, dropout: float) -> tuple[Tensor, Tensor]:
    """``residual + dropout(x)`` and its LN."""
    from . import op_add_norm

    return op_add_norm.add_norm(x, residual, *norm, p=dropout, seed=_seed(x, dropout))


def linear_norm(
    x: Tensor, pairs: Pairs, bias: Tensor | None, residual: Tensor, norm: Norm, dropout: float
) -> Tensor:
    """``LN(residual + dropout(linear(x)))``."""
    from . import op_blocks

    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    seed = _seed(x, dropout)
    return op_blocks.linear_norm(x, a, b, bias, residual, *norm, p=dropout, seed=seed)


def ffn_norm(
    x: Tensor,
    expand: tuple[Pairs, Groups, Tensor | None],
    contract: tuple[Pairs, Groups, Tensor | None],
    norm: Norm,
    gelu: Gelu,
    dropout: float,
) -> Tensor | None:
    """``LN(x + dropout(contract(gelu(expand(x)))))``, each map as (groups, shapes, bias); None for
    pairs of shapes that the kernels do not join."""
    from . import op_blocks

    (first, first_shapes, first_bias), (last, last_shapes, last_bias) = expand, contract
    if len(first) > 1 or len(last) > 1:
        return None
    if not op_blocks.ffn_fits(first_shapes[0], last_shapes[0]):
        return None
    maps = (*first[0], first_bias, *last[0], last_bias)
    activation, seed = activation_of(x, gelu), _seed(x, dropout)
    return op_blocks.ffn_norm(x, *maps, *norm, activation=activation, p=dropout, seed=seed)


def expand_gelu(x: Tensor, pairs: Pairs, bias: Tensor | None, gelu: Gelu) -> Tensor:
    """``gelu(linear(x))``."""
    from . import op_linear

    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    return op_linear.kron_linear(x, a, b, bias, activation_of(x, gelu))


def gated(pair: Tensor, gelu: Gelu, dropout: float) -> Tensor:
    """``dropout(gelu(u) * g)``, u and g the halves of pair (..., 2 * hidden)."""
    from . import op_gated

    activation, seed = activation_of(pair, gelu), _seed(pair, dropout)
    return op_gated.gated(pair, activation=activation, p=dropout, seed=seed)


def embed_norm(
    ids: Tensor,
    pairs: Pairs,
    table: Tensor,
    norm: Norm | None,
    position: Lookup | None,
    kind: Lookup | None,
    padding_idx: int | None,
) -> Tensor | None:
    """``LN(word rows + type rows + position rows)``; None for tables the kernel does not read:
    several groups, or rows that share entries (b_out > 1)."""
    from . import op_embedding

    if len(pairs) > 1 or (pairs and pairs[0][1].shape[1] != 1):
        return None
    a, b = (pairs[0][0], pairs[0][1]) if pairs else (table, None)
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    return op_embedding.embed_norm(
        ids, a, b, weight, bias, eps, position=position, kind=kind, padding_idx=padding_idx
    )


def activation_of(x: Tensor, gelu: Gelu) -> str:
    """The kernels' name of a GELU; float32 is always exact."""
    return "gelu_fast" if gelu == "fast" and x.dtype != torch.float32 else "gelu"


def _seed(x: Tensor, dropout: float) -> Tensor | None:
    """Drawn on the device, so that CUDA graphs and `torch.manual_seed` rule it."""
    if not dropout:
        return None
    return torch.randint(2**62, (1,), device=x.device, dtype=torch.int64)


@cache
def _supported(device: int) -> bool:
    if not _TRITON or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST
