"""The op `kronbert::embed_norm`: embedding rows, summed and normalised by one Triton kernel.

Defined by `kronbert.blocks.embed_norm`. It computes in float32 inside and returns the tables'
dtype, under autocast too: no table is cast. Kernels are imported when the op runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .errors import KronbertError, ShapeError

if TYPE_CHECKING:
    from .kernels.embedding import Inputs


class Lookup(NamedTuple):
    """Rows ``ids`` of a dense table (entries, width); padding_idx gets no gradient."""

    ids: Tensor
    table: Tensor
    padding_idx: int | None = None


def embed_norm(
    ids: Tensor,
    a: Tensor,
    b: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    position: tuple[Tensor, Tensor, int | None] | None = None,
    kind: tuple[Tensor, Tensor, int | None] | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """``LN(word rows + type rows + position rows)``: ids (...) -> (..., width).

    One group, a (entries, rank, a_in), b (rank, 1, b_in); or a dense table a (entries, width), b
    None. position, kind: (ids, table, padding_idx) as `blocks.Lookup`, their ids broadcasting
    against ``ids``. weight None: no LayerNorm. Raises `ShapeError` for tensors that do not go
    together, IndexError for ids outside a table where they can be read without waiting, on a
    CPU; on a GPU such an id reads the nearest entry."""
    tables: list[Any] = []
    for name, given in (("position", position), ("type", kind)):
        lookup = None if given is None else Lookup(*given)
        tables += (
            (None, None, -1)
            if lookup is None
            else (
                _periodic(name, lookup.ids, ids.shape),
                lookup.table,
                _padding(lookup.padding_idx, lookup.table),
            )
        )
    out, _, _ = _embed_norm(
        ids.reshape(-1), a, b, *tables, weight, bias, eps, _padding(padding_idx, a)
    )
    return out.view(*ids.shape, out.shape[-1])


def _padding(padding_idx: int | None, table: Tensor) -> int:
    """Counted from the start; -1 for none."""
    if padding_idx is None:
        return -1
    return padding_idx + table.shape[0] if padding_idx < 0 else padding_idx


def _periodic(name: str, ids: Tensor, shape: torch.Size) -> Tensor:
    """``ids`` as one dimension that, repeated, fills ``shape``: (1, tokens) stays (tokens)."""
    sizes = list(ids.shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    if sizes == list(shape[len(shape) - len(sizes) :]) and len(sizes) <= len(shape):
        return ids.reshape(-1)
    try:
        return ids.expand(shape).reshape(-1)
    except RuntimeError:
        raise ShapeError(
            f"embed_norm: {name} ids {tuple(ids.shape)} beside ids {tuple(shape)}: expected a "
            "shape that broadcasts to theirs. Pass (1, tokens) or one id per token."
        ) from None


def _check_ids(where: str, ids: Tensor, entries: int) -> None:
    """On a GPU the answer would have to be waited for."""
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= entries:
        raise IndexError(
            f"embed_norm: {where} ids from {low} to {high} in a table of {entries} entries. Check "
            "the tokenizer and the length of the input."
        )


def _inputs(
    ids: Tensor,
    a: Tensor,
    b: Tensor | None,
    position_ids: Tensor | None,
    position: Tensor | None,
    position_padding: int,
    kind_ids: Tensor | None,
    kind: Tensor | None,
    kind_padding: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
) -> Inputs:
    from .kernels.embedding import Inputs, Table

    def table(rows: Tensor | None, entries: Tensor | None, pad: int) -> Table | None:
        if rows is None or entries is None:
            return None
        return Table(rows, entries, None if pad < 0 else pad)

    return Inputs(
        ids,
        a,
        b,
        table(position_ids, position, position_padding),
        table(kind_ids, kind, kind_padding),
        weight,
        bias,
        eps,
        None if padding < 0 else padding,
    )


@torch.library.custom_op("kronbert::embed_norm", mutates_args=())
def _embed_norm(
    ids: Tensor,
    a: Tensor,
    b: Tensor | None,
    position_ids: Tensor | None,
    position: Tensor | None,
    position_padding: int,
    kind_ids: Tensor | None,
    kind: Tensor | None,
    kind_padding: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (n, width), mean (n), 1/std (n)): `kernels.embedding.embed_norm`."""
    from .kernels import embedding

    _check_ids("word", ids, a.shape[0])
    if position_ids is not None and position is not None:
        _check_ids("position", position_ids, position.shape[0])
    if kind_ids is not None and kind is not None:
        _check_ids("type", kind_ids, kind.shape[0])
    given = _inputs(
        ids, a, b, position_ids, position, position_padding, kind_ids, kind, kind_padding,
        weight, bias, eps, padding,
    )  # fmt: skip
    return embedding.embed_norm(given)


@_embed_norm.register_fake
def _(ids: Tensor, a: Tensor, b: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, width = ids.shape[0], a.shape[-1] * (1 if b is None else b.shape[-1])
    rows = n if rest[6] is not None else 0
    mean, rstd = (a.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return a.new_empty(n, width), mean, rstd


@torch.library.custom_op("kronbert::embed_norm_backward", mutates_args=())
def _embed_norm_backward(
    grad: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    ids: Tensor,
    a: Tensor,
    b: Tensor | None,
    position_ids: Tensor | None,
    position: Tensor | None,
    position_padding: int,
    kind_ids: Tensor | None,
    kind: Tensor | None,
    kind_padding: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
) -> list[Tensor]:
    """Gradients of a, b, position, kind, weight, bias; empty where ``needs`` is False."""
    from .kernels import embedding

    given = _inputs(
        ids, a, b, position_ids, position, position_padding, kind_ids, kind, kind_padding,
        weight, bias, eps, padding,
    )  # fmt: skip
    with torch.autocast(grad.device.type, enabled=False):  # gradients keep the dtype of forward
        found = embedding.embed_norm_backward(grad, given, mean, rstd, tuple(needs))
    return [a.new_empty(0) if tensor is None else tensor for tensor in found]


@_embed_norm_backward.register_fake
def _(
    grad: Tensor, mean: Tensor, rstd: Tensor, needs: list[bool], ids: Tensor, *rest: Any
) -> list[Tensor]:
    a, b, _, position, _, _, kind, _, weight, bias, _, _ = rest
    tensors = (a, b, position, kind, weight, bias)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else a.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    ]


FLOATS = (1, 2, 4, 7, 9, 10)
"""Places of a, b, position, kind, weight and bias among the op's arguments."""


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.save_for_backward(mean, rstd, *(inputs[i] for i in tensors))
    ctx.places = tensors
    ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * len(ctx.rest)
    if grad is None:
        return tuple(found)
    mean, rstd, *tensors = ctx.saved_tensors
    inputs = list(ctx.rest)
    for i, tensor in zip(ctx.places, tensors, strict=True):
        inputs[i] = tensor
    needs = [ctx.needs_input_grad[i] and inputs[i] is not None for i in FLOATS]
    grads = _embed_norm_backward(grad.contiguous(), mean, rstd, needs, *inputs)
    for i, one, need in zip(FLOATS, grads, needs, strict=True):
        found[i] = one if need else None
    return tuple(found)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise KronbertError(
        "embed_norm: no second derivative: the fused kernel has a first one only. Differentiate "
        "twice on a model after kronbert.unfuse(model)."
    )


_embed_norm.register_autograd(_backward, setup_context=_setup)
_embed_norm_backward.register_autograd(_refuse)
