"""Embedding rows and LayerNorm in one kernel, beside their definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kronbert import reference
from kronbert.errors import ShapeError

pytest.importorskip("triton", reason="Triton is published for Linux only")

from kronbert.kernels import embedding
from kronbert.kernels.embedding import Inputs, Table, embed_norm, embed_norm_backward
from kronbert.kernels.segment_sum import segment_sum
from tests.embedding_inputs import DEVICE, SHAPES, make


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


def test_a_products_columns_fit_the_smallest_cards():
    """Compute capability 8.6 has 99 KiB of shared memory for the two tiles in flight."""
    for width in (256, 312, 768, 1000, 1024, 2048):
        a, b = torch.empty(40, 128, 1).half(), torch.empty(128, 1, width).half()
        sizes = embedding._sizes(embedding.Inputs(torch.zeros(3).long(), a, b), 4)
        assert 2 * sizes["BLOCK_RANK"] * sizes["BLOCK"] * 2 <= 72 * 1024
        assert sizes["BLOCK"] * sizes["CHUNKS"] >= width
