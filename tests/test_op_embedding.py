"""The op of the embedding kernel: autograd, compile, autocast, broadcast ids, refusals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kronbert import op_embedding
from kronbert.errors import KronbertError, ShapeError

pytest.importorskip("triton", reason="Triton is published for Linux only")

from tests.embedding_inputs import DEVICE, EPS, make


def arguments(shape: str = "odd", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    given: Any = make(shape, 30, dtype)
    tensors = (given.a, given.b, given.weight, given.bias)
    a, b, weight, bias = (t if t is None else t.clone().requires_grad_() for t in tensors)
    position = (torch.arange(6, device=DEVICE)[None], given.position.table.requires_grad_(), None)
    kind = (given.kind.ids.view(5, 6), given.kind.table.requires_grad_(), None)
    return {
        "ids": given.ids.view(5, 6), "a": a, "b": b, "weight": weight, "bias": bias, "eps": EPS,
        "position": position, "kind": kind, "padding_idx": 4,
    }  # fmt: skip


def leaves_of(given: dict[str, Any]) -> list[Tensor]:
    found = [given["a"], given["b"], given["position"][1], given["kind"][1]]
    return [t for t in [*found, given["weight"], given["bias"]] if t is not None]


def plain(ids, a, b, weight, bias, eps, position, kind, padding_idx):
    """`blocks.embed_norm`, which defines the op."""
    from kronbert import blocks

    norm = None if weight is None else blocks.Norm(weight, bias, eps)
    return blocks.embed_norm(
        ids,
        [a],
        [] if b is None else [b],
        norm,
        position=blocks.Lookup(*position),
        kind=blocks.Lookup(*kind),
        padding_idx=padding_idx,
    )


@pytest.mark.parametrize("shape", ["odd", "dense odd"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_op_is_blocks_embed_norm(shape, compiled):
    given = arguments(shape)
    op = op_embedding.embed_norm
    if compiled:
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    out, expected = op(**given), plain(**given)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, leaves_of(given), grad)
    true = torch.autograd.grad(expected, leaves_of(given), grad)
    for one, two in zip(ours, true, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["odd", "dense odd"])
def test_opcheck(shape):
    given = arguments(shape)
    flat = (
        given["ids"].reshape(-1), given["a"], given["b"],
        given["position"][0].reshape(-1), given["position"][1], -1,
        given["kind"][0].reshape(-1), given["kind"][1], -1,
        given["weight"], given["bias"], EPS, 4,
    )  # fmt: skip
    torch.library.opcheck(op_embedding._embed_norm, flat)
    grad = torch.randn(30, given["weight"].shape[0], device=DEVICE)
    detached = [t.detach() if isinstance(t, Tensor) else t for t in flat]
    _, mean, rstd = op_embedding._embed_norm(*detached)
    needs = [True, given["b"] is not None, False, True, True, True]
    torch.library.opcheck(op_embedding._embed_norm_backward, (grad, mean, rstd, needs, *detached))


def test_only_what_needs_a_gradient_gets_one():
    given = arguments()
    given["a"] = given["a"].detach()
    out = op_embedding.embed_norm(**given)
    out.sum().backward()
    assert given["a"].grad is None
    assert given["b"].grad is not None
    with torch.no_grad():
        assert not op_embedding.embed_norm(**given).requires_grad


def test_ids_may_broadcast_and_be_strided():
    given = arguments()
    whole = op_embedding.embed_norm(**given)
    turned = {**given, "ids": given["ids"].T.contiguous().T, "a": given["a"][:, :, :]}
    assert torch.equal(whole, op_embedding.embed_norm(**turned))
    rows = torch.arange(5, device=DEVICE)[:, None]
    by_row = {**given, "position": (rows, *given["position"][1:])}
    expanded = {**given, "position": (rows.expand(5, 6), *given["position"][1:])}
    assert torch.equal(op_embedding.embed_norm(**by_row), op_embedding.embed_norm(**expanded))
    with pytest.raises(ShapeError, match=r"position ids \(4,\) beside ids \(5, 6\)"):
        op_embedding.embed_norm(**{**given, "position": (rows[:4, 0], *given["position"][1:])})


def test_autocast_casts_no_table():
    given = arguments()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = op_embedding.embed_norm(**given)
    assert out.dtype == torch.float32
    assert torch.equal(out, op_embedding.embed_norm(**given))


def test_a_second_derivative_is_refused():
    given = arguments()
    out = op_embedding.embed_norm(**given)
    (grad,) = torch.autograd.grad(out.square().sum(), given["b"], create_graph=True)
    with pytest.raises(KronbertError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.skipif(DEVICE != "cpu", reason="ids on a GPU are not waited for")
@pytest.mark.parametrize("name", ["word", "position", "type"])
def test_an_id_outside_its_table_is_named_on_a_cpu(name):
    given = arguments()
    ids = torch.full((5, 6), 99)
    if name == "word":
        given["ids"] = ids
    else:
        key = "position" if name == "position" else "kind"
        given[key] = (ids, *given[key][1:])
    with pytest.raises(IndexError, match=f"{name} ids from 99 to 99 in a table of"):
        op_embedding.embed_norm(**given)


def test_importing_the_op_loads_no_triton():
    code = "import sys, kronbert.op_embedding; print([m for m in sys.modules if 'triton' == m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_gradients_inside_autocast_are_those_outside():
    """A backward pass inside: float32 tables' gradients are not computed in half precision."""

    def gradients(inside):
        torch.manual_seed(3)
        given = arguments("large b")
        out = op_embedding.embed_norm(**given)
        leaves = [given["a"], given["b"]]
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=inside):
            return torch.autograd.grad(out.square().sum(), leaves)

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)
