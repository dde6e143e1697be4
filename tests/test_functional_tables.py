"""The plain path's tables against their definitions: embedding, logits, the padding entry."""

import pytest
import torch
from torch import nn

from kronbert import functional, reference
from tests.random_terms import terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_round_no_worse_than_eager(dtype):
    a, b = terms("3:50x6*1x4", dtype)
    ids, h = torch.arange(50), torch.randn(7, 24).to(dtype)
    table = a.transpose(0, 1).contiguous()
    for name, one, ours in (
        ("kron_embedding", ids, functional.kron_embedding(ids, table, b)),
        ("kron_logits", h, functional.kron_logits(h, table, b)),
    ):
        define = getattr(reference, name)
        wide = one.double() if one.is_floating_point() else one
        exact = define(wide, a.double(), b.double())
        eager = (define(one, a, b).double() - exact).square().mean().sqrt()
        off = (ours.double() - exact).square().mean().sqrt()
        assert off <= 2 * eager, f"{name} {dtype}: off by {off:.1e}, eager by {eager:.1e}"


def test_gradients_of_tables():
    ids = torch.tensor([0, 3, 3, 5])
    for spec in ("2:6x2*1x3", "2:3x2*2x3"):
        a, b = terms(spec)
        a, b = a.transpose(0, 1).contiguous().requires_grad_(), b.requires_grad_()
        lookup = lambda a, b: functional.kron_embedding(ids, a, b)  # noqa: E731
        assert torch.autograd.gradcheck(lookup, (a, b))
        assert torch.autograd.gradgradcheck(lookup, (a, b))
        h = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(functional.kron_logits, (h, a, b))
        assert torch.autograd.gradgradcheck(functional.kron_logits, (h, a, b))


@pytest.mark.parametrize("spec", ["3:50x6*1x4", "2:10x6*5x4"])
def test_autocast_leaves_an_embedding_as_it_leaves_torchs(spec):
    (a, b), (c, d) = terms(spec, torch.float32), terms("50x1*1x24", torch.float32)
    ids, a, c = torch.tensor([[1, 2, 49]]), a.transpose(0, 1), c.transpose(0, 1)[20:]
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.kron_embedding(ids, [a, c], [b, d], starts=[0, 20])
        assert nn.Embedding(50, 24)(ids).dtype == found.dtype == torch.float32
    assert torch.equal(found, functional.kron_embedding(ids, [a, c], [b, d], starts=[0, 20]))


@pytest.mark.parametrize(
    "spec", ["50x6*1x4", "3:50x6*1x4", "7:50x1*1x24", "2:10x6*5x4", "5x3*10x8"]
)
def test_embedding_and_logits_are_their_definitions(spec):
    a, b = terms(spec)
    table = a.transpose(0, 1)
    bias = torch.randn(50, dtype=torch.float64)
    for ids in (
        torch.tensor([[0, 49, 7], [7, 7, 3]]),
        torch.tensor(5),
        torch.tensor([2, 4], dtype=torch.int32),
        torch.arange(6).view(2, 3).T,
        torch.empty(0, dtype=torch.long),
        torch.empty(2, 0, dtype=torch.long),
    ):
        found = functional.kron_embedding(ids, table, b)
        torch.testing.assert_close(found, reference.kron_embedding(ids.long(), a, b))
    for h in (torch.randn(2, 3, 24), torch.randn(24), torch.randn(0, 24), torch.randn(24, 4).T):
        h = h.double()
        found = functional.kron_logits(h, table, b, bias)
        torch.testing.assert_close(found, reference.kron_logits(h, a, b, bias))


def test_groups_of_a_table():
    pairs = [terms("2:10x6*5x4"), terms("3:50x1*1x24")]
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    table, ids = [one.transpose(0, 1) for one in a], torch.tensor([0, 49, 23])
    found = functional.kron_embedding(ids, table, b)
    torch.testing.assert_close(found, reference.kron_embedding(ids, a, b))
    h = torch.randn(4, 24, dtype=torch.float64)
    torch.testing.assert_close(functional.kron_logits(h, table, b), reference.kron_logits(h, a, b))


@pytest.mark.parametrize("spec", ["2:6x2*1x3", "2:3x2*2x3"])
@pytest.mark.parametrize("padding_idx", [4, -2])
def test_the_padding_entry_gives_no_gradient(spec, padding_idx):
    """As `nn.Embedding`: the same rows, and gradients as if the padding were not there."""
    a, b = terms(spec)
    a, b = a.transpose(0, 1).contiguous().requires_grad_(), b.requires_grad_()
    ids = torch.tensor([[4, 1, 4], [5, 4, 0]])
    found = functional.kron_embedding(ids, a, b, padding_idx)
    assert torch.equal(found, functional.kron_embedding(ids, a, b))
    grads = torch.autograd.grad(found.square().sum(), (a, b))
    without = functional.kron_embedding(ids[ids != 4], a, b).square().sum()
    for ours, expected in zip(grads, torch.autograd.grad(without, (a, b)), strict=True):
        torch.testing.assert_close(ours, expected)
    if b.shape[1] == 1:
        assert not grads[0][4].any()
