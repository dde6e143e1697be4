"""The masked-word loss in pieces, beside its definition in one piece in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kronbert import reference
from kronbert.distill.objectives import kl_logits
from kronbert.errors import KronbertError, ShapeError
from kronbert.losses import mlm_loss

ROWS, ENTRIES, TEACHER_WIDTH = 13, 30, 9
KINDS: dict[str, Any] = {
    "1x5": ([(30, 1, 4)], [(1, 1, 5)]),
    "3 terms": ([(30, 3, 4)], [(3, 1, 5)]),
    "shared rows": ([(10, 2, 4)], [(2, 3, 5)]),
    "groups": ([(30, 1, 4), (30, 2, 1)], [(1, 1, 5), (2, 1, 20)]),
    "blocks": ([(30, 2, 4), (7, 3, 1), (3, 2, 2)], [(2, 1, 5), (3, 1, 20), (2, 3, 10)]),
    "dense": ([(30, 20)], []),
}
STARTS = {"blocks": (0, 4, 21)}


def words(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of `mlm_loss`; five rows have no label."""
    a, b = KINDS[kind]
    labels = torch.randint(0, ENTRIES, (ROWS,))
    labels[torch.tensor([0, 3, 4, 9, 12])] = -100
    leaves = [torch.randn(*size, dtype=dtype, requires_grad=True) for size in (*a, *b)]
    a_leaves, b_leaves = leaves[: len(a)], leaves[len(a) :]
    return {
        "h": torch.randn(ROWS, 20, dtype=dtype, requires_grad=True),
        "a": a_leaves if len(a) > 1 else a_leaves[0],
        "b": b_leaves if len(b) > 1 else b_leaves[0] if b else None,
        "bias": torch.randn(ENTRIES, dtype=dtype, requires_grad=True),
        "labels": labels,
        "starts": STARTS.get(kind),
    }


def teacher_of(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((ROWS, TEACHER_WIDTH), (ENTRIES, TEACHER_WIDTH), (ENTRIES,))
    h, weight, bias = (torch.randn(*size, dtype=dtype) for size in sizes)
    return h, weight, bias


def leaves_of(given: dict[str, Any]) -> list[Tensor]:
    found = [given["h"], given["bias"]]
    for one in (given["a"], given["b"]):
        found += [one] if isinstance(one, Tensor) else list(one or [])
    return found


def definition(given, teacher=None, temperature=1.0) -> tuple[Tensor, Tensor | None]:
    """Both losses from whole logits."""
    a, b = given["a"], given["b"]
    if b is None:
        weight = a
    elif isinstance(a, Tensor):
        weight = reference.kron_weight(a.transpose(0, 1), b)
    else:
        weight = reference.kron_weight([one.transpose(0, 1) for one in a], b, given["starts"])
    scores = F.linear(given["h"], weight, given["bias"])
    cross_entropy = F.cross_entropy(scores.to(torch.float64), given["labels"])
    if teacher is None:
        return cross_entropy, None
    keep = (given["labels"] != -100)[:, None]
    return cross_entropy, kl_logits(scores, F.linear(*teacher), keep, temperature)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 8, None])
@pytest.mark.parametrize("temperature", [None, 1.0, 2.5, 0.4])
def test_mlm_loss_is_its_definition(kind, chunk, temperature):
    given = words(kind)
    teacher = None if temperature is None else teacher_of()
    cross_entropy, kl = mlm_loss(
        **given, teacher=teacher, temperature=temperature or 1.0, chunk=chunk
    )
    true, true_kl = definition(given, teacher, temperature or 1.0)
    torch.testing.assert_close(cross_entropy, true)
    total, true_total = cross_entropy * 0.7, true * 0.7
    if teacher is not None:
        torch.testing.assert_close(kl, true_kl)
        total, true_total = total + 1.3 * kl, true_total + 1.3 * true_kl
    else:
        assert kl is None
    ours = torch.autograd.grad(total, leaves_of(given))
    expected = torch.autograd.grad(true_total, leaves_of(given))
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", ["3 terms", "groups", "blocks", "dense"])
def test_mlm_loss_gradcheck(kind):
    given = words(kind)
    leaves = leaves_of(given)
    groups = len(KINDS[kind][0])
    labels, teacher = given["labels"], teacher_of()

    def call(h, bias, *matrices):
        a, b = list(matrices[:groups]), list(matrices[groups:])
        more = {"starts": given["starts"], "teacher": teacher, "temperature": 2.0, "chunk": 3}
        return mlm_loss(h, a, b or None, bias, labels, **more)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("loss", [0, 1], ids=["cross entropy", "kl"])
def test_either_loss_alone(loss):
    given, teacher = words("3 terms"), teacher_of()
    ours = torch.autograd.grad(mlm_loss(**given, teacher=teacher)[loss], leaves_of(given))
    expected = torch.autograd.grad(
        definition(given, teacher)[loss], leaves_of(given), allow_unused=True
    )
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["3 terms", "blocks"])
def test_mlm_loss_rounds_no_worse_than_eager(kind, dtype):
    given = words(kind, dtype)
    teacher = teacher_of(dtype)
    exact_given = {
        name: [t.detach().double().requires_grad_() for t in x]
        if isinstance(x, list)
        else x.detach().double().requires_grad_()
        if name in ("h", "a", "b", "bias")
        else x
        for name, x in given.items()
    }
    exact = definition(exact_given, tuple(t.double() for t in teacher))
    eager = definition(given, teacher)
    ours = mlm_loss(**given, teacher=teacher, chunk=3)
    found = [
        [*losses, *torch.autograd.grad(sum(losses), leaves_of(leaves))]
        for losses, leaves in ((ours, given), (eager, given), (exact, exact_given))
    ]
    for one, plain, true in zip(*found, strict=True):
        fused = (one.double() - true).square().mean().sqrt()
        error = (plain.double() - true).square().mean().sqrt()
        units = 1 if true.dim() else 4  # of one number, eager's error may be 0 by chance
        floor = units * torch.finfo(dtype).eps / 2 * true.double().square().mean().sqrt() + 1e-7
        assert fused <= 2 * error + floor


def test_many_chunks_are_summed_in_float32():
    """In bfloat16 a sum of 700 chunks would stand still long before its end."""
    h = torch.zeros(700, 2, dtype=torch.bfloat16)
    table = torch.ones(3, 2, dtype=torch.bfloat16)
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    mlm_loss(h, table, None, bias, torch.zeros(700, dtype=torch.int64), chunk=1)[0].backward()
    assert bias.grad.tolist() == pytest.approx([-2 / 3, 1 / 3, 1 / 3], rel=5e-3)


def test_small_probabilities_survive_float16():
    """The mean over many rows would make 1 / entries vanish before the loss scale could help."""
    h = torch.zeros(64, 2, dtype=torch.float16, requires_grad=True)
    table = torch.ones(30000, 2, dtype=torch.float16, requires_grad=True)
    bias = torch.zeros(30000, dtype=torch.float16, requires_grad=True)
    loss, _ = mlm_loss(h, table, None, bias, torch.zeros(64, dtype=torch.int64))
    (loss * 1024).backward()
    assert bias.grad[1].item() == pytest.approx(1024 / 30000, rel=1e-2)


def test_no_label_is_a_loss_of_zero():
    given = words("1x5")
    given["labels"] = torch.full((ROWS,), -100)
    losses = mlm_loss(**given, teacher=teacher_of())
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()
    assert all(not leaf.grad.any() for leaf in leaves_of(given))


def test_leading_dimensions_and_another_ignored_label():
    given = words("1x5")
    flat, _ = mlm_loss(**given)
    labels = given["labels"].clone()
    labels[labels == -100] = -1
    whole = {**given, "h": given["h"][None], "labels": labels[None]}
    assert torch.equal(flat, mlm_loss(**whole, ignore_index=-1)[0])


def test_only_what_needs_a_gradient_gets_one():
    given = words("1x5")
    given["a"], given["bias"] = given["a"].detach(), None
    mlm_loss(**given, teacher=teacher_of())[1].backward()
    assert given["a"].grad is None
    assert given["b"].grad.any()
    with torch.no_grad():
        assert not mlm_loss(**given)[0].requires_grad


class Largest(TorchDispatchMode):
    """The most numbers any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_mlm_loss_never_holds_tokens_times_vocabulary():
    rows, entries, chunk = 64, 500, 8
    h = torch.randn(rows, 20, requires_grad=True)
    a = torch.randn(entries, 1, 4, requires_grad=True)
    b = torch.randn(1, 1, 5, requires_grad=True)
    teacher = (torch.randn(rows, 6), torch.randn(entries, 6), None)
    labels = torch.randint(0, entries, (rows,))
    with Largest() as chunked:
        sum(mlm_loss(h, a, b, None, labels, teacher=teacher, chunk=chunk)).backward()
    assert chunked.numbers == chunk * entries
    with Largest() as whole:
        sum(mlm_loss(h, a, b, None, labels, teacher=teacher, chunk=rows)).backward()
    assert whole.numbers == rows * entries


def test_autocast_casts_a_dense_weight_once_for_all_chunks():
    """It keeps a copy of what it casts for each leaf, until it ends."""
    given = words("dense", torch.float32)
    weight, casts = given["a"], []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == weight.shape:
                casts.append(kwargs["dtype"])
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Casts():
        mlm_loss(**given, chunk=2)
    assert casts.count(torch.bfloat16) == 1


def test_as_many_rows_at_a_time_as_the_bytes_hold(monkeypatch):
    h, table = torch.randn(64, 2), torch.randn(500, 2)
    labels = torch.randint(0, 500, (64,))
    exact, _ = mlm_loss(h, table, None, None, labels)
    for number, rows in ((4 * 500 * 8, 8), (4 * 500 * 9 - 1, 8), (1, 1)):
        monkeypatch.setattr("kronbert.losses.CHUNK_BYTES", number)
        with Largest() as chunked:
            torch.testing.assert_close(mlm_loss(h, table, None, None, labels)[0], exact)
        assert chunked.numbers == max(rows * 500, table.numel())


def test_a_teacher_in_half_precision_answers_in_float32():
    given = words("1x5", torch.float32)
    h = torch.eye(TEACHER_WIDTH)[torch.arange(ROWS) % TEACHER_WIDTH].bfloat16()
    weight = torch.randn(ENTRIES, TEACHER_WIDTH).bfloat16()  # a score is one of its numbers
    _, kl = mlm_loss(**given, teacher=(h, weight, None), temperature=3.0)
    _, exact = definition(given, (h.float(), weight.float(), None), 3.0)
    torch.testing.assert_close(kl, exact)


def test_both_losses_can_be_summed_in_place():
    total, kl = mlm_loss(**words("1x5"), teacher=teacher_of())
    expected = total + kl
    total += kl
    assert torch.equal(total, expected)


def test_a_checkpointed_loss_has_the_same_gradients():
    given, teacher = words("blocks"), teacher_of()

    def gradients(call):
        losses = call(**given, teacher=teacher, temperature=2.0)
        return torch.autograd.grad(losses[0] + 3 * losses[1], leaves_of(given))

    def repeated(**given):
        return checkpoint(mlm_loss, use_reentrant=False, **given)

    for got, want in zip(gradients(repeated), gradients(mlm_loss), strict=True):
        assert torch.equal(got, want)


def test_a_second_derivative_is_refused():
    given = words("1x5")
    (grad,) = torch.autograd.grad(mlm_loss(**given)[0], given["h"], create_graph=True)
    with pytest.raises(KronbertError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": torch.zeros(3).long()}, r"labels \(3,\), h \(13, 20\): expected one label"),
        ({"labels": torch.full((ROWS,), 30)}, "labels from 30 to 30 with 30 entries"),
        ({"labels": torch.full((ROWS,), -1)}, "labels from -1 to -1 .* need ignore_index=-100"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk": 0}, "chunk=0"),
        ({"b": None}, r"weight \(30, 1, 4\) without b"),
        ({"a": torch.zeros(30, 1, 20).double(), "b": None}, r"weight \(30, 1, 20\) without b"),
        (
            {"h": torch.tensor(1.0), "labels": torch.tensor(1)},
            r"h \(\): expected one label per row",
        ),
        ({"starts": (3,)}, r"groups of \[30\] rows from \[3\] on"),
        (
            {"a": torch.zeros(30, 20).double(), "b": None, "starts": (0,)},
            r"starts=\(0,\)\) without b",
        ),
        ({"h": torch.zeros(ROWS, 21).double()}, "a_in \\* b_in"),
        ({"teacher": (torch.zeros(2, 9), torch.zeros(30, 9), None)}, "expected as many rows"),
        ({"teacher": (torch.zeros(ROWS, 9), torch.zeros(31, 9), None)}, r"expected \(30, 9\)"),
        ({"teacher": (torch.zeros(ROWS, 9), torch.zeros(30, 8), None)}, r"expected \(30, 9\)"),
        (
            {
                "h": torch.zeros(1, ROWS, 20).double(),
                "labels": torch.zeros(1, ROWS).long(),
                "teacher": (torch.zeros(1, ROWS + 1, 9), torch.zeros(30, 9), None),
            },
            "expected as many rows",
        ),
    ],
)
def test_mlm_loss_refuses(changes, said):
    with pytest.raises(ShapeError, match=said):
        mlm_loss(**{**words("1x5"), **changes})
