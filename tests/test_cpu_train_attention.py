"""Attention with gradients on a CPU, on the row kernels: the plain numbers, and no scores kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kronbert import blocks, cpu_train, functional, native
from kronbert.blocks import Linear
from kronbert.errors import KronbertError

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's forms"),
    pytest.mark.skipif(native.library() is None, reason="no compiler"),
]

WIDTH, INF = 96, float("inf")


def a_map(out, bias=True, rank=5):
    made = [torch.randn(rank, out, 1) / rank**0.5, torch.randn(rank, 1, WIDTH) / WIDTH**0.5]
    made += [torch.randn(out)] if bias else []
    for tensor in made:
        tensor.requires_grad_(True)
    return Linear([made[0]], [made[1]], made[2] if bias else None)


def plain(x, query, key, value, heads, scale, mask=None):
    q, k, v = (
        functional.kron_linear(x, *one).unflatten(-1, (heads, -1)).transpose(1, 2)
        for one in (query, key, value)
    )
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).flatten(2)


def gradients(call, x, maps, *more):
    x = x.clone().requires_grad_(True)
    tensors = [x, *(t for m in maps for t in (*m.a, *m.b, m.bias) if t is not None)]
    y = call(x, *maps, *more)
    slope = torch.sin(torch.arange(float(y.numel())).view_as(y))
    return y, torch.autograd.grad(y, tensors, slope)


def agrees(x, maps, *more):
    (y, found), (expected, own) = (gradients(call, x, maps, *more) for call in (blocks.attention,
                                                                               plain))  # fmt: skip
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    off = 1e-5 * max(float(want.abs().max()) for want in own)  # of one token q's and k's are 0
    for got, want in zip(found, own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=off)


def test_checkpointed_attention_has_the_same_gradients():
    torch.manual_seed(0)
    x, maps = torch.randn(3, 17, WIDTH), [a_map(96) for _ in range(3)]

    def repeated(*given):
        return checkpoint(blocks.attention, *given, use_reentrant=False)

    (y, found), (expected, own) = (
        gradients(call, x, maps, 3, 0.2) for call in (repeated, blocks.attention)
    )
    assert torch.equal(y, expected)
    for got, want in zip(found, own, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 16, 17, 29, 130])
@pytest.mark.parametrize(("heads", "out"), [(3, 96), (2, 32), (1, 128), (2, 96)])
def test_the_numbers_are_the_plain_ones(tokens, heads, out):
    torch.manual_seed(tokens)
    maps = [a_map(out, bias=i != 1) for i in range(3)]
    x, scale = torch.randn(3, tokens, WIDTH), 0.9 * (out / heads) ** -0.5
    agrees(x, maps, heads, scale)
    seen = torch.ones(3, 1, 1, tokens, dtype=torch.bool)
    seen[1, ..., (tokens + 1) // 2 :] = False
    agrees(x, maps, heads, scale, seen)
    agrees(x, maps, heads, scale, seen.expand(-1, -1, tokens, -1))
    agrees(x, maps, heads, scale, torch.randn(3, 1, tokens, tokens))


def test_more_than_one_thread():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    maps, x = [a_map(96) for _ in range(3)], torch.randn(5, 11, WIDTH)
    try:
        torch.set_num_threads(3)
        agrees(x, maps, 3, 0.2)
    finally:
        torch.set_num_threads(before)


def test_the_derivatives_are_the_functions():
    """By differences in float64 of the plain function: not of the same kernel's forward."""
    torch.manual_seed(1)
    q, k, v, slope = (torch.randn(2, 9, 32) for _ in range(4))
    found = native.attention_backward(q, k, v, None, 2, 0.4, slope)

    def whole(*three):
        a, b, c = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in three)
        y = torch.softmax(0.4 * a @ b.mT, -1) @ c
        return (y.transpose(1, 2).flatten(2) * slope.double()).sum()

    given = [x.double() for x in (q, k, v)]
    for which, gradient in enumerate(found):
        for place in ((0, 0, 0), (1, 8, 31), (0, 5, 17)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x.clone() for x in given]
                moved[which][place] += step
                ends.append(whole(*moved))
            slope_here = float(ends[0] - ends[1]) / 2e-5
            assert float(gradient[place]) == pytest.approx(slope_here, rel=1e-3, abs=1e-4)


def test_a_query_that_sees_nothing_gives_no_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 32)
    mask = torch.zeros(2, 1, 16)
    mask[1] = -INF
    for gradient in native.attention_backward(x, x, x, mask, 2, 1.0, torch.ones_like(x)):
        assert gradient[0].abs().max() > 0
        assert torch.equal(gradient[1], torch.zeros(7, 32))


def test_scores_are_not_kept():
    tokens = 200
    maps, x = [a_map(96) for _ in range(3)], torch.randn(2, tokens, WIDTH, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        blocks.attention(x, *maps, 3, 0.2)
    assert max(kept) <= 2 * tokens * 96  # scores: 2 * 3 * tokens * tokens = 2.1 times as many


def inputs_kept(maps):
    """How often the three maps keep x for the backward pass."""
    x, kept = torch.randn(2, 150, WIDTH, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), id):
        blocks.attention(x, *maps, 3, 0.2)
    return kept.count(x.data_ptr())


def test_truncated_svds_read_the_input_once():
    ranks = [a_map(96, rank=rank) for rank in (5, 3, 8)]
    assert inputs_kept(ranks) == 1
    agrees(torch.randn(2, 150, WIDTH), ranks, 3, 0.2)


def test_other_maps_read_it_one_by_one():
    made = [torch.randn(2, 8, 8) / 8**0.5, torch.randn(2, 12, 12) / 12**0.5, torch.randn(96)]
    a, b, bias = (tensor.requires_grad_(True) for tensor in made)
    product = Linear([a], [b], bias)
    one, other = a_map(96), a_map(96, rank=2)
    two = Linear([one.a[0], other.a[0]], [one.b[0], other.b[0]], one.bias)
    for odd in (product, two):
        maps = [a_map(96), odd, a_map(96)]
        assert inputs_kept(maps) > 1
        agrees(torch.randn(2, 150, WIDTH), maps, 3, 0.2)


def test_what_is_not_taken():
    maps, x = tuple(a_map(96) for _ in range(3)), torch.randn(2, 7, WIDTH)

    def takes(x=x, maps=maps, heads=3, mask=None):
        return cpu_train.attention(x, maps, heads, 0.2, mask) is not None

    assert takes()
    assert not takes(heads=4)  # heads of 24
    assert not takes(heads=5)
    assert not takes(x=x[0])
    assert not takes(x=x[:0])
    assert not takes(x=torch.randn(1, 513, WIDTH))
    assert not takes(mask=torch.zeros(2, 1, 7, 7, requires_grad=True))
    assert not takes(mask=torch.zeros(2, 3, 7, 7))
    assert not takes(maps=(maps[0], maps[1], a_map(48)))
    with torch.no_grad():
        assert not takes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes()
    doubles = tuple(
        Linear([m.a[0].double()], [m.b[0].double()], m.bias.double()) for m in maps
    )  # fmt: skip
    assert not takes(x=x.double(), maps=doubles)


def test_no_second_derivative():
    maps, x = [a_map(96) for _ in range(3)], torch.randn(2, 7, WIDTH, requires_grad=True)
    y = blocks.attention(x, *maps, 3, 0.2)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(KronbertError, match=r"no second derivative.*kronbert.unfuse\(model\)"):
        torch.autograd.grad(first.sum(), x, retain_graph=True)
    with pytest.raises(KronbertError, match="no second derivative"):
        first.sum().backward()


def test_many_gradients_at_once_are_refused():
    maps, x = [a_map(96) for _ in range(3)], torch.randn(2, 7, WIDTH, requires_grad=True)
    y = blocks.attention(x, *maps, 3, 0.2)
    with pytest.raises(KronbertError, match=r"one gradient at a time.*kronbert.unfuse\(model\)"):
        torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)
