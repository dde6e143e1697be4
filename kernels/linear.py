"""``x · (sum_r a[r] ⊗ b[r])ᵀ + bias``, then an activation, in one kernel; and three maps of one x.

Each group runs as one launch of its family (`small_big`, `two_dot`, `low_rank`). Groups, and ranks
beyond what a launch keeps in registers, are summed over several launches through a float32 buffer
(n, out), which costs 8 bytes of traffic per output and launch after the first. Backward:
`linear_backward`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ShapeError
from ..shapes import KroneckerShape
from . import low_rank, small_big, two_dot
from .epilogue import Ending
from .gelu import Activation, require_activation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: Activation = None,
    *,
    dy: Tensor | None = None,
) -> Tensor:
    """``act(x · Wᵀ + bias)``, W the sum of the groups: x (n, in) -> (n, out).

    a (rank, a_out, a_in), b (rank, b_out, b_in) per group; contiguous tensors of one dtype
    (float32, float16, bfloat16) and device, no autograd. With dy (n, out) the result is
    ``dy * act'(x · Wᵀ + bias)``, what backward needs of the activation. Defined by
    `kronbert.reference.kron_linear`. Raises `ShapeError` for tensors that do not fit together."""
    act = require_activation("linear", activation)
    out = check("linear", x, a, b, bias)
    require_contiguous("linear", x=x, a=list(a), b=list(b), bias=bias, dy=dy)
    if dy is not None and (dy.shape != (x.shape[0], out) or dy.dtype != x.dtype):
        raise ShapeError(
            f"linear: dy {tuple(dy.shape)} of {dy.dtype}: expected {(x.shape[0], out)} of "
            f"{x.dtype}, the gradient of the output."
        )
    y = x.new_empty(x.shape[0], out)
    if x.shape[0] == 0:
        return y
    steps = [(x, *step) for pair in zip(a, b, strict=True) for step in launches(*pair)]
    run_sum(steps, y, None if bias is None else [bias], dy, act)
    return y


def qkv(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Three maps of one input: x (n, in), three a and three b of one shape -> three (n, out).

    One launch reads a tile of x for all three; a rank too high for one launch is run as three
    `linear`. Raises `ShapeError` when the shapes differ, or some have a bias and others none."""
    if not len(a) == len(b) == len(bias) == 3:
        raise ShapeError(
            f"qkv: {len(a)} a, {len(b)} b, {len(bias)} biases: expected three of each, one group "
            "per map. Call linear once per map for sums of groups."
        )
    shapes = {str(shape_of(*pair)) for pair in zip(a, b, strict=True)}
    if len(shapes) > 1 or len({one is None for one in bias}) > 1:
        raise ShapeError(
            f"qkv: shapes {', '.join(sorted(shapes))}, biases "
            f"{[None if one is None else tuple(one.shape) for one in bias]}: expected one shape, "
            "and a bias for all or none. Call linear three times."
        )
    for one_a, one_b, one_bias in zip(a, b, bias, strict=True):
        out = check("qkv", x, [one_a], [one_b], one_bias)
    require_contiguous("qkv", x=x, a=list(a), b=list(b), bias=[v for v in bias if v is not None])
    steps = [launches(*pair) for pair in zip(a, b, strict=True)]
    if len(steps[0]) > 1:
        q, k, v = (linear(x, [a[p]], [b[p]], bias[p]) for p in range(3))
        return q, k, v
    q, k, v = (x.new_empty(x.shape[0], out) for _ in range(3))
    if x.shape[0]:
        biases = [one for one in bias if one is not None]
        ready = [step[0] for step in steps]
        _run(x, [p[0] for p in ready], [p[1] for p in ready], [q, k, v], Ending(biases or None))
    return q, k, v


def shape_of(a: Tensor, b: Tensor) -> KroneckerShape:
    """The shape of a (rank, a_out, a_in) and b (rank, b_out, b_in); else `ShapeError`."""
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0]:
        raise ShapeError(
            f"linear: a {tuple(a.shape)}, b {tuple(b.shape)}: expected a (rank, a_out, a_in) and b "
            "(rank, b_out, b_in) with the same rank. One term needs rank 1: unsqueeze it."
        )
    rank, a_out, a_in = (int(size) for size in a.shape)
    return KroneckerShape(a_out, a_in, int(b.shape[1]), int(b.shape[2]), rank)


def launches(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """One group's terms, cut into what one launch can sum.

    (1 x in) ⊗ (out x 1), what backward makes of a low rank, is (out x 1) ⊗ (1 x in) again."""
    shape = shape_of(a, b)
    if shape.a_out == shape.b_in == 1:
        a, b = b, a
        shape = shape_of(a, b)
    side = small_big.sides(shape)
    if shape.low_rank:
        most = low_rank.LARGEST_RANK
    else:
        most = shape.rank if side is None else small_big.rank_limit(side)
    return list(zip(a.split(most), b.split(most), strict=True))


def run_sum(
    steps: list[tuple[Tensor, Tensor, Tensor]],
    y: Tensor,
    bias: list[Tensor] | None = None,
    dy: Tensor | None = None,
    act: str = "",
) -> None:
    """Sum ``x · (a ⊗ b)ᵀ`` of each (x, a, b) in float32; the last launch ends it and writes y."""
    before = None
    for x, a, b in steps[:-1]:
        partial = y.new_empty(y.shape, dtype=torch.float32) if before is None else before
        _run(x, [a], [b], [partial], Ending(partial=before))
        before = partial
    x, a, b = steps[-1]
    _run(x, [a], [b], [y], Ending(bias, before, dy, act))


def _run(x: Tensor, a: list[Tensor], b: list[Tensor], ys: list[Tensor], ending: Ending) -> None:
    """One launch of the family that suits the shape."""
    shape = shape_of(a[0], b[0])
    side = small_big.sides(shape)
    if shape.low_rank:
        low_rank.launch(x, a, b, ys, ending)
    elif side is not None:
        small_big.launch(x, a, b, ys, side, ending)
    else:
        two_dot.launch(x, a, b, ys, shape, ending)


def check(
    where: str, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Tensor | None
) -> int:
    """out; `ShapeError` unless x, the groups and the bias go together."""
    if not a or len(a) != len(b):
        raise ShapeError(
            f"{where}: {len(a)} a and {len(b)} b: expected as many of each, at least one group."
        )
    shapes = [shape_of(*pair) for pair in zip(a, b, strict=True)]
    sizes = {(shape.out_features, shape.in_features) for shape in shapes}
    out, inner = shapes[0].out_features, shapes[0].in_features
    if len(sizes) > 1:
        raise ShapeError(
            f"{where}: the groups make weights of {' and '.join(f'{o}x{i}' for o, i in sizes)}: "
            "expected one size. Sum only groups of the same layer."
        )
    if x.dim() != 2 or x.shape[1] != inner:
        raise ShapeError(
            f"{where}: x {tuple(x.shape)}: expected (rows, {inner}) for {shapes[0]}. Flatten "
            "leading dimensions: x.reshape(-1, x.shape[-1])."
        )
    if bias is not None and bias.shape != (out,):
        raise ShapeError(f"{where}: bias {tuple(bias.shape)}: expected ({out},), one per output.")
    for tensor in [x, *a, *b] if bias is None else [x, *a, *b, bias]:
        if tensor.dtype not in DTYPES or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ShapeError(
                f"{where}: x is {x.dtype} on {x.device}, another tensor {tensor.dtype} on "
                f"{tensor.device}: expected one device and one of float32, float16, bfloat16. "
                "Cast or move one; for float64 use kronbert.functional.kron_linear."
            )
    return out


def require_contiguous(where: str, **tensors: Tensor | list[Tensor] | None) -> None:
    """Raise `ShapeError` naming the first tensor that is not contiguous."""
    for name, given in tensors.items():
        for tensor in given if isinstance(given, list) else [given]:
            if tensor is not None and not tensor.is_contiguous():
                raise ShapeError(
                    f"{where}: {name} {tuple(tensor.shape)} has strides {tensor.stride()}: "
                    "expected a contiguous tensor. Call .contiguous() on it."
                )
