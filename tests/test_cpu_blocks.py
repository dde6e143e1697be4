"""Fused blocks on the CPU's row kernels: their numbers, and whom they leave alone."""

import pytest
import torch
import torch.nn.functional as F

from kronbert import KroneckerLinear, ShapeError, blocks, cpu_blocks, native
from kronbert.blocks import Norm
from kronbert.shapes import parse_groups
from tests.small_blocks import (
    Half,
    a_norm,
    assert_near,
    exact,
    exact_norm,
    layer,
    needs_kernels,
    norm_of,
    of,
)

pytestmark = pytest.mark.usefixtures("nothing_kept")
INF = float("inf")


# What runs, and its numbers.


@torch.no_grad()
@pytest.mark.parametrize("dtype", native.DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("leading", [(1,), (3,), (2, 7), (40,)])
def test_feed_forward_half(leading, dtype, kernels, ran):
    half, x = Half(dtype), torch.randn(*leading, 48).to(dtype)
    for _ in range(2):
        assert_near(half.ours(x), half.exact(x))
    assert ran == ({"ffn_middle": 2, "add_norm": 2} if kernels else {})


@torch.no_grad()
def test_slices_that_do_not_meet(kernels, ran):
    """Maps cut the hidden layer unlike, into too many slices, or of narrow ones: one by one."""
    pairs = [("6x3*32x16", "3x12*16x16"), ("6x3*8x16", "3x6*16x8")]
    pairs += [("4:6x3*32x16", "3x6*16x32"), ("6x3*32x16", "4:3x6*16x32")]
    for up, down in pairs:
        expand, contract, x = layer(up), layer(down), torch.randn(5, 48)
        found = blocks.ffn(x, of(expand), of(contract))
        assert_near(found, exact(contract, F.gelu(exact(expand, x))))
    assert not ran["ffn_middle"]
    assert ran["bias_gelu"] == (4 if kernels else 0)


@torch.no_grad()
@pytest.mark.parametrize("which", ["expand", "contract"])
def test_a_sum_of_products_is_not_joined(which, kernels, ran):
    maps = {"expand": layer("6x3*32x16"), "contract": layer("3x6*16x32")}
    inner, out = maps[which].in_features, maps[which].out_features
    shape = maps[which].groups[0].spec
    maps[which] = KroneckerLinear(inner, out, parse_groups(f"{shape} + {out}x1*1x{inner}"))
    x = torch.randn(5, 48)
    found = blocks.ffn(x, of(maps["expand"]), of(maps["contract"]))
    assert_near(found, exact(maps["contract"], F.gelu(exact(maps["expand"], x))))
    assert not ran["ffn_middle"]


@torch.no_grad()
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_ranks_of_a_feed_forward_half(ranks, kernels, ran):
    expand, contract = layer(f"{ranks[0]}:6x3*32x16"), layer(f"{ranks[1]}:3x6*16x32")
    x = torch.randn(5, 48)
    found = blocks.ffn(x, of(expand), of(contract))
    assert_near(found, exact(contract, F.gelu(exact(expand, x))))
    assert ran["ffn_middle"] == int(kernels)


@torch.no_grad()
@pytest.mark.parametrize("dtype", native.DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_norm(biased, dtype, kernels, ran):
    linear, norm = layer("6x6*8x8", dtype, bias=biased), a_norm(48, dtype)
    for leading in ((1,), (2, 7), (40,)):
        x, residual = (torch.randn(*leading, 48).to(dtype) for _ in range(2))
        before = residual.clone()
        found = blocks.linear_norm(x, of(linear), residual, norm_of(norm))
        assert_near(found, exact_norm(norm, residual.double() + exact(linear, x)))
        assert torch.equal(residual, before)
    assert ran["add_norm"] == (3 if kernels else 0)


@torch.no_grad()
@pytest.mark.parametrize("biased", [True, False])
def test_missing_biases(biased, kernels):
    half, x = Half(bias=biased), torch.randn(5, 48)
    assert_near(half.ours(x), half.exact(x))
    inner = exact(half.contract, F.gelu(exact(half.expand, x)))
    assert_near(blocks.ffn(x, of(half.expand), of(half.contract)), inner)
    norm = half.norm
    assert_near(blocks.residual_norm(x, None, norm_of(norm)), exact_norm(norm, x))
    plain = Norm(norm.weight, None, norm.eps)
    expected = exact_norm(norm, x) - norm.bias.double()
    assert_near(blocks.residual_norm(x, None, plain), expected)


@torch.no_grad()
def test_a_residual_of_another_size_is_broadcast(kernels, ran):
    norm, x = a_norm(48), torch.randn(6, 48)
    for residual in (torch.randn(1, 48), torch.randn(2, 6, 48)):
        expected = exact_norm(norm, x.double() + residual.double())
        assert_near(blocks.residual_norm(x, residual, norm_of(norm)), expected)
    assert not ran


@torch.no_grad()
def test_no_rows(kernels):
    half = Half()
    for shape in ((0, 48), (2, 0, 48)):
        assert half.ours(torch.randn(shape)).shape == shape


def attended(x, maps, heads, scale, mask):
    """In float64."""
    q, k, v = (exact(m, x).unflatten(-1, (heads, -1)).transpose(1, 2) for m in maps)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=wide, scale=scale)
    return y.transpose(1, 2).flatten(2)


def three(shape="6x6*8x8", dtype=torch.float32):
    return [layer(shape, dtype) for _ in range(3)]


def masks(batch, tokens):
    """Every form a mask comes in, by name."""
    long = torch.arange(tokens) < torch.arange(1, batch + 1)[:, None] * tokens // batch
    padding = long[:, None, None]
    own = torch.rand(batch, 1, tokens, tokens) > 0.3
    own[..., 0] = True
    numbers = torch.randn(batch, 1, tokens, tokens)
    return {
        "none": None,
        "padding": padding,
        "padding for each query": padding.expand(-1, -1, tokens, -1),
        "padding, copied for each query": padding.expand(-1, -1, tokens, -1).contiguous(),
        "of each query": own,
        "of the first sequence for all": own[:1],
        "numbers": numbers,
        "numbers for all queries": numbers[:, :, :1],
        "lowest for hidden": torch.zeros(padding.shape).masked_fill(~padding, -3.4028e38),
        "infinite for hidden": torch.zeros(padding.shape).masked_fill(~padding, -INF),
    }


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 16, 40])
@pytest.mark.parametrize("name", masks(2, 5))
def test_masks(name, tokens, ran):
    maps, x, mask = three(), torch.randn(2, tokens, 48), masks(2, tokens)[name]
    for _ in range(2):
        found = blocks.attention(x, *map(of, maps), 3, 0.3, mask)
        assert_near(found, attended(x, maps, 3, 0.3, mask))
    assert ran["attention"] == 2


@needs_kernels
@torch.no_grad()
def test_a_mask_is_read_anew_when_it_changes(ran):
    """One mask for every layer is turned to numbers once; not for a change, or another batch."""
    maps, x = three(), torch.randn(3, 7, 48)
    mask = torch.ones(1, 1, 1, 7, dtype=torch.bool)

    def check(x, mask):
        found = blocks.attention(x, *map(of, maps), 3, 0.3, mask)
        assert_near(found, attended(x, maps, 3, 0.3, mask))

    check(x, mask)
    mask[..., 3:] = False
    check(x, mask)
    for batch in (1, 3, 2):  # the same mask
        check(x[:batch].contiguous(), mask)
    other = mask.clone()
    other[..., 1] = False
    check(x, other)
    del other
    check(x, torch.tensor([True, False, True, True, False, True, True])[None, None, None])
    with torch.inference_mode():
        mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
        check(x, mask)
        mask[1, ..., 2:] = False
        check(x, mask)
    assert ran["attention"] == 9
    mask = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    check(x, mask)
    shorter = x[:, :5].contiguous()
    assert blocks.attention(shorter, *map(of, maps), 3, 0.3, mask) is None


@needs_kernels
@torch.no_grad()
def test_attention_that_is_not_taken():
    maps, x = [of(one) for one in three()], torch.randn(2, 5, 48)

    def taken(x=x, maps=maps, heads=3, mask=None):
        return cpu_blocks.attention(x, tuple(maps), heads, 0.3, mask) is not None

    assert taken()
    assert not taken(heads=6)  # heads of 8
    assert not taken(heads=5)
    assert not taken(x[0])
    assert taken(torch.randn(1, cpu_blocks.TOKENS, 48))
    assert not taken(torch.randn(1, cpu_blocks.TOKENS + 1, 48))
    assert not taken(maps=[of(one) for one in three("3x6*8x8")])
    assert not taken(maps=[*maps[:2], of(layer("12x6*8x8"))])
    half = [of(one) for one in three(dtype=torch.bfloat16)]
    assert taken(x.bfloat16(), half)
    assert taken(torch.randn(1, cpu_blocks.HALF_TOKENS, 48).bfloat16(), half)
    assert not taken(torch.randn(1, cpu_blocks.HALF_TOKENS + 1, 48).bfloat16(), half)
    assert not taken(x.double(), [of(one) for one in three(dtype=torch.float64)])
    for size in ((2, 3, 5, 5), (2, 5), (2, 1, 1, 6), (3, 1, 1, 5), (2, 1, 4, 5)):
        assert not taken(mask=torch.ones(size, dtype=torch.bool)), size
    assert not taken(mask=torch.zeros(2, 1, 1, 5).double())
    assert taken(maps=[of(one) for one in three("16x6*8x8")], heads=1)  # the widest head
    wide = [of(one) for one in three("24x6*8x8")]
    assert not taken(maps=wide, heads=1)  # a head of 192
    with torch.enable_grad():
        assert not taken()
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken()


# Whom it leaves alone: the plain calls run, and give the right numbers or the right error.


@needs_kernels
def test_what_is_left_alone(ran):
    half, x = Half(), torch.randn(6, 48)
    expected = half.exact(x)

    def plain(call=half.ours, x=x, expected=expected):
        ran.clear()
        found = call(x)
        assert not ran["ffn_middle"], "ran in the kernels"
        assert_near(found.detach(), expected)

    plain()  # gradients
    x.requires_grad_()
    with torch.no_grad():
        plain(x=x.T.contiguous().T.detach())
        found = half.ours(x.detach())
        assert ran["ffn_middle"] == 1
        assert not found.requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            ran.clear()
            found = half.ours(x.detach())
            assert not ran["ffn_middle"] + ran["add_norm"]
            assert (found.double() - expected).abs().max() < 0.1
        torch._dynamo.reset()
        plain(torch.compile(half.ours, fullgraph=True, backend="aot_eager"), x.detach())
        torch._dynamo.reset()
        plain(torch.vmap(half.ours), x.detach()[None], expected[None])
        with torch.inference_mode():
            other = Half()
        inference = other.exact(x.detach())
        plain(other.ours, x.detach(), inference)
        with torch.inference_mode():
            other.expand.a.mul_(2)
            plain(other.ours, x.detach(), other.exact(x.detach()))
        odd = layer("4x4*6x6"), a_norm(24)  # 24 wide
        y = torch.randn(5, 24)
        ran.clear()
        found = blocks.linear_norm(y, of(odd[0]), y, norm_of(odd[1]))
        assert_near(found, exact_norm(odd[1], y.double() + exact(odd[0], y)))
        assert not ran


@torch.no_grad()
def test_parts_that_do_not_fit_are_refused(kernels):
    """As plain calls refuse them: the kernels check nothing."""
    half, x = Half(), torch.randn(6, 48)
    short, norm = torch.randn(47), norm_of(half.norm)
    up, down = of(half.expand), of(half.contract)
    square, maps = of(layer("6x6*8x8")), [of(one) for one in three()]
    with pytest.raises(ShapeError, match="bias"):
        blocks.ffn_norm(x, up._replace(bias=short), down, norm)
    with pytest.raises(ShapeError, match="bias"):
        blocks.ffn_norm(x, up._replace(bias=short[:1]), down, norm)
    with pytest.raises(ShapeError, match=r"bias is torch\.float64"):
        blocks.ffn_norm(x, up._replace(bias=up.bias.double()), down, norm)
    with pytest.raises(ShapeError, match="bias"):
        blocks.ffn(x, up, down._replace(bias=short))
    with pytest.raises(ShapeError, match="bias"):
        blocks.linear_norm(x, square._replace(bias=short), x, norm)
    with pytest.raises(RuntimeError):
        blocks.residual_norm(x, x, norm._replace(bias=short))
    with pytest.raises(ShapeError, match=r"is torch.bfloat16, a is torch.float32"):
        blocks.ffn_norm(x.bfloat16(), up, down, norm)
    with pytest.raises(ShapeError, match=r"input \(6, 32\)"):
        blocks.ffn_norm(x[:, :32].contiguous(), up, down, norm)
    meta = up._replace(a=[half.expand.a.to("meta")])
    with pytest.raises(ShapeError, match="on meta"):
        blocks.ffn_norm(x, meta, down, norm)
    wrong = (maps[0]._replace(bias=short), maps[1], maps[2])
    assert blocks.attention(x[None], *wrong, 3, 0.3) is None
