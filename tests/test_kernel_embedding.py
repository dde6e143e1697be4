"""Embedding rows and LayerNorm in one kernel, beside their definition in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kronbert import op_embedding, reference
from kronbert.errors import KronbertError, ShapeError

pytest.importorskip("triton", reason="Triton is published for Linux only")

from kronbert.kernels import embedding
from kronbert.kernels.embedding import Inputs, Table, embed_norm, embed_norm_backward
from kronbert.kernels.segment_sum import segment_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

# a (rank, a_in), b_in; None: a dense table.
SHAPES: dict[str, Any] = {
    "k5 and k19": ((1, 64), 12),
    "k8": ((1, 96), 8),
    "k21": ((1, 48), 16),
    "three terms": ((3, 24), 16),
    "svd": ((5, 1), 384),
    "svd on tensor cores": ((20, 1), 384),
    "many terms": ((11, 3), 7),
    "large b": ((2, 3), 100),
    "odd": ((2, 7), 5),
    "dense": ((1, 384), None),
    "dense odd": ((1, 39), None),
    "dense 1,024": ((1, 1024), None),
}


def make(shape: str, n: int, dtype: torch.dtype, entries: int = 23, **changes: Any) -> Inputs:
    """`Inputs` with every table; ids that repeat, one of them more often than a chunk is long."""
    (rank, a_in), b_in = SHAPES[shape]
    width = a_in * (b_in or 1)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE).to(dtype)

    ids = torch.randint(0, entries, (n,), device=DEVICE)
    ids[n // 3 : n // 2] = 4
    period = n // 3 if n % 3 == 0 else n
    given: dict[str, Any] = {
        "ids": ids,
        "a": random(entries, rank, a_in) if b_in else random(entries, width),
        "b": random(rank, 1, b_in) if b_in else None,
        "position": Table(torch.arange(period, device=DEVICE) % 13, random(13, width)),
        "kind": Table(ids.to(torch.int32) % 2, random(2, width)),
        "weight": random(width),
        "bias": random(width),
        "eps": EPS,
    }
    return Inputs(**{**given, **changes})


def definition(given: Inputs, dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """The result by plain operations in ``dtype``, and its inputs a, b, position, ... as leaves."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().to(dtype or tensor.dtype).requires_grad_())
        return leaves[-1]

    a, ids = leaf(given.a), given.ids.long()
    if given.b is None:
        x = F.embedding(ids, a, given.padding_idx)
    else:
        b = leaf(given.b)
        # Padding gives no gradient to b either, as functional.kron_embedding.
        x = reference.kron_embedding(ids, a.transpose(0, 1), b)
        if given.padding_idx is not None:
            x = torch.where((ids == given.padding_idx)[:, None], x.detach(), x)
    for lookup in (given.position, given.kind):
        if lookup is None:
            continue
        rows, table, padding_idx = lookup.ids, leaf(lookup.table), lookup.padding_idx
        x = x + F.embedding(rows.long().repeat(len(ids) // max(1, len(rows))), table, padding_idx)
    if given.weight is None:
        return x, leaves
    weight = leaf(given.weight)
    bias = None if given.bias is None else leaf(given.bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, given.eps), leaves


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def require_no_worse(ours: Tensor, eager: Tensor, exact: Tensor, what: str) -> None:
    """At most twice eager's error. The floor is 4 units of fp32: the interpreter's sums go row by
    row, where a GPU's and eager's are trees."""
    floor = 5e-7 * (1 + rms(exact))
    fused, plain = rms(ours - exact), rms(eager - exact)
    assert ours.dtype == eager.dtype, what
    assert fused <= 2 * plain + floor, f"{what}: kernel off by {fused:.1e}, eager by {plain:.1e}"


def compare(given: Inputs) -> None:
    """Forward and every gradient."""
    out, mean, rstd = embed_norm(given)
    eager, eager_leaves = definition(given)
    exact, leaves = definition(given, torch.float64)
    require_no_worse(out, eager, exact, "out")
    grad = torch.randn(out.shape, device=DEVICE).to(out.dtype)
    tensors = (given.a, given.b, given.position, given.kind, given.weight, given.bias)
    needs = tuple(tensor is not None for tensor in tensors)
    found = embed_norm_backward(grad, given, mean, rstd, needs)
    eager_grads = torch.autograd.grad(eager, eager_leaves, grad)
    exact_grads = torch.autograd.grad(exact, leaves, grad.double())
    ours = [value for value in found if value is not None]
    assert len(ours) == len(exact_grads)
    names = [name for name, value in zip(found._fields, found, strict=True) if value is not None]
    for name, one, plain, true in zip(names, ours, eager_grads, exact_grads, strict=True):
        require_no_worse(one, plain, true, f"gradient of {name}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounds_no_worse_than_eager(shape, dtype):
    compare(make(shape, 48, dtype))


@pytest.mark.parametrize("n", [1, 17, 33])
def test_any_number_of_rows(n):
    compare(make("k21", n, torch.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {"position": None},
        {"kind": None},
        {"bias": None},
        {"weight": None, "bias": None},
        {"weight": None, "bias": None, "position": None, "kind": None},
        {"padding_idx": 4},
    ],
    ids=lambda changes: "no " + ", ".join(changes) if "padding_idx" not in changes else "padding",
)
@pytest.mark.parametrize("shape", ["k21", "dense", "large b"])
def test_parts_may_be_left_out(shape, changes):
    compare(make(shape, 45, torch.float32, **changes))


def test_padding_of_tables_gets_no_gradient():
    given = make("k21", 45, torch.float32)
    position, kind = given.position, given.kind
    changed = {"position": position._replace(padding_idx=2), "kind": kind._replace(padding_idx=1)}
    given = make("k21", 45, torch.float32, **changed)
    compare(given)


def test_no_rows():
    given = make("k21", 0, torch.float16)
    out, mean, rstd = embed_norm(given)
    found = embed_norm_backward(out, given, mean, rstd, (True,) * 6)
    assert out.shape == (0, 768)
    for tensor, grad in zip((given.a, given.b, given.position.table), found, strict=False):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_ids_outside_the_table_read_the_nearest_entry():
    given = make("k21", 6, torch.float32)
    low = make("k21", 6, torch.float32, a=given.a, b=given.b, position=None, kind=None)
    ids = torch.tensor([-5, 0, 22, 23, 10**12, 4], device=DEVICE)
    wild, tame = (
        embed_norm(make("k21", 6, torch.float32, **{**vars(low), "ids": one}))[0]
        for one in (ids, ids.clamp(0, 22))
    )
    assert torch.equal(wild, tame)
    grad = segment_sum(torch.ones(6, 8, device=DEVICE), ids, torch.zeros(23, 8, device=DEVICE))
    assert grad[:, 0].nonzero().flatten().tolist() == [0, 4, 22]
    assert grad[22, 0] == 3


@pytest.mark.parametrize("width", [16, 5, 300])
@pytest.mark.parametrize("runs", [[1], [32], [31, 1, 33], [64, 100, 10], [7] * 15], ids=str)
def test_segment_sum_of_every_run_length(runs, width):
    """Runs inside a chunk, that end at its border, that cross it, that fill several."""
    require_segment_sum(runs, width)


def test_segment_sum_of_a_run_longer_than_a_step():
    """1,024 rows are what the second kernel adds up at a time."""
    require_segment_sum([5, 1100, 2], 16)


def require_segment_sum(runs: list[int], width: int) -> None:
    ids = torch.repeat_interleave(torch.arange(len(runs)) * 2, torch.tensor(runs))
    shuffled = ids[torch.randperm(len(ids))].to(DEVICE)
    rows = torch.randn(len(ids), width, device=DEVICE)
    table = torch.zeros(2 * len(runs) + 1, width, device=DEVICE)
    exact = table.double().index_add(0, shuffled, rows.double())
    torch.testing.assert_close(
        segment_sum(rows, shuffled, table).double(), exact, atol=1e-3, rtol=0
    )
    without = segment_sum(rows, shuffled, table, padding_idx=0)
    assert not without[0].any()
    torch.testing.assert_close(without[1:].double(), exact[1:], atol=1e-3, rtol=0)


def test_two_runs_are_equal():
    given = make("odd", 70, torch.float16)
    out, mean, rstd = embed_norm(given)
    first, second = (embed_norm_backward(out, given, mean, rstd, (True,) * 6) for _ in range(2))
    assert torch.equal(out, embed_norm(given)[0])
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_inputs_are_not_written_to():
    given = make("odd", 45, torch.float32)
    before = [t.clone() for t in (given.ids, given.a, given.b, given.weight, given.bias)]
    out, mean, rstd = embed_norm(given)
    grad = out.clone()
    embed_norm_backward(grad, given, mean, rstd, (True,) * 6)
    assert torch.equal(grad, out)
    after = (given.ids, given.a, given.b, given.weight, given.bias)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"ids": torch.zeros(2, 3, dtype=torch.int64)},
            r"ids \(2, 3\) of torch.int64: expected one",
        ),
        ({"ids": torch.zeros(6)}, "expected one dimension of int32 or int64"),
        (
            {"a": torch.zeros(23, 1, 48).double()},
            "a is torch.float64: the kernel computes in float32",
        ),
        ({"b": None}, r"table \(23, 1, 48\) without b"),
        ({"b": torch.zeros(1, 2, 16)}, r"b \(1, 2, 16\): expected a \(entries, rank, a_in\)"),
        ({"weight": torch.zeros(7)}, r"weight \(7,\): expected \(768,\)"),
        ({"weight": torch.zeros(768).half()}, "a is torch.float32, weight is torch.float16"),
        ({"kind": Table(torch.zeros(4).long(), torch.zeros(2, 768))}, "divides that number"),
        ({"kind": Table(torch.zeros(6).long(), torch.zeros(2, 5))}, "expected a width of 768"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, said):
    moved = {
        name: Table(value.ids.to(DEVICE), value.table.to(DEVICE))
        if isinstance(value, Table)
        else value if value is None else value.to(DEVICE)
        for name, value in changes.items()
    }  # fmt: skip
    with pytest.raises(ShapeError, match=said):
        embed_norm(make("k21", 6, torch.float32, **moved))


# The op.


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


def test_a_products_columns_fit_the_smallest_cards():
    """Compute capability 8.6 has 99 KiB of shared memory for the two tiles in flight."""
    for width in (256, 312, 768, 1000, 1024, 2048):
        a, b = torch.empty(40, 128, 1).half(), torch.empty(128, 1, width).half()
        sizes = embedding._sizes(embedding.Inputs(torch.zeros(3).long(), a, b), 4)
        assert 2 * sizes["BLOCK_RANK"] * sizes["BLOCK"] * 2 <= 72 * 1024
        assert sizes["BLOCK"] * sizes["CHUNKS"] >= width
