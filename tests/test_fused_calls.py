"""The calls of layers that norm before their halves, `add_norm` and `gated_ffn`, on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kronbert import blocks, reference
from kronbert.errors import ShapeError
from tests.fusion_models import assert_same


def linear_of(out: int, inner: int, *, bias: bool = True, groups: int = 1) -> blocks.Linear:
    a = [torch.randn(2, out // 4, inner // 3) * 0.3 for _ in range(groups)]
    b = [torch.randn(2, 4, 3) * 0.3 for _ in range(groups)]
    return blocks.Linear(a, b, torch.randn(out) if bias else None)


def plain_gated(x: Tensor, expand: blocks.Linear, contract: blocks.Linear) -> Tensor:
    u, g = reference.kron_linear(x, *expand).chunk(2, -1)
    return reference.kron_linear(F.gelu(u) * g, *contract)


@pytest.mark.parametrize("rows", [(), (0,), (7,), (2, 3, 5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_gated_ffn(rows, groups, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 72 * 4 * 3)  # three rows at a time
    maps = linear_of(72, 12, groups=groups), linear_of(12, 36, bias=False, groups=groups)
    x = torch.randn(*rows, 12)
    before = x.clone()
    expected = plain_gated(x, *maps)
    with torch.no_grad():
        assert_same(blocks.gated_ffn(x, *maps), expected)
    assert torch.equal(x, before)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for m in maps for t in (*m.a, *m.b))]
    leaves.append(maps[0].bias.requires_grad_())
    found, wanted = (
        torch.autograd.grad(f(x, *maps).square().sum(), leaves)
        for f in (blocks.gated_ffn, plain_gated)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_training_keeps_no_hidden_layer():
    """On a CPU, without dropout."""
    maps = linear_of(72, 12), linear_of(12, 36)
    x = torch.randn(5, 12, requires_grad=True)
    widths: list[int] = []

    def pack(t: Tensor) -> Tensor:
        widths.append(t.shape[-1] if t.dim() else 0)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = blocks.gated_ffn(x, *maps)
        assert not [w for w in widths if w in (36, 72)]
        plain_gated(x, *maps)
        assert 36 in widths
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("grad", [True, False])
def test_gated_ffn_drops_the_hidden_layer(grad):
    """An identity after it shows what was kept."""
    expand = blocks.Linear([torch.zeros(1, 80, 1)], [torch.zeros(1, 1, 40)], torch.ones(80))
    contract = blocks.Linear([torch.eye(40)[None]], [torch.ones(1, 1, 1)], None)
    x = torch.randn(300, 40)
    with torch.set_grad_enabled(grad):
        expand.a[0].requires_grad_(grad)
        y = blocks.gated_ffn(x, expand, contract, dropout=0.25)
    kept = (y != 0).float().mean().item()
    assert abs(kept - 0.75) < 0.02, "12,000 draws: 5 standard deviations"
    torch.testing.assert_close(y.max(), F.gelu(torch.ones(())) / 0.75)


def test_gated_ffn_says_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"expand gives 72, contract takes 72: expected twice"):
        blocks.gated_ffn(torch.randn(3, 12), linear_of(72, 12), linear_of(12, 72))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("grad", [True, False])
def test_add_norm(dropout, grad):
    x = torch.randn(3, 400, 12)
    residual, weight = torch.randn(3, 400, 12), torch.randn(12)
    before = x.clone(), residual.clone()
    after = blocks.Norm(weight, None, 1e-5)
    with torch.set_grad_enabled(grad):
        total, normed = blocks.add_norm(x, residual, after, dropout=dropout)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    added = total - residual
    kept = added.abs() > 1e-6
    assert abs(kept.float().mean().item() - (1 - dropout)) < 0.02, "14,400 draws: 5 deviations"
    torch.testing.assert_close(added[kept], x[kept] / (1 - dropout), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(normed, F.layer_norm(total, (12,), weight, None, 1e-5))


def test_add_norm_sums_in_the_wider_dtype():
    after = blocks.Norm(torch.ones(12), torch.zeros(12), 1e-5)
    x, residual = torch.randn(3, 12), torch.randn(3, 12)
    total, normed = blocks.add_norm(x.bfloat16(), residual, after)
    assert total.dtype == normed.dtype == torch.float32
    assert torch.equal(total, residual + x.bfloat16().float())
