"""The row kernels in C: each function against its definition in float64, rounding as torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kronbert import native
from tests.row_definitions import (
    add_norm,
    assert_rounds_no_worse,
    attention,
    bias_gelu,
    bits,
    compare,
    ffn_middle,
    gather,
    mix,
    normal,
    spread,
)

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no row kernels here: off Linux, no C compiler, or turned off"
)
DTYPES = pytest.mark.parametrize("dtype", native.DTYPES, ids=["float32", "bfloat16"])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def threads():
    """Tests may set another number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# mix: q of 1, 2, 4, 8 and 16 has code of its own.
@DTYPES
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("q", [1, 2, 3, 4, 7, 8, 16])
def test_mix(q, biased, dtype):
    for n, p, w in [(1, 1, 16), (2, 5, 48), (3, 16, 192), (129, 2, 48), (5, 17, 16)]:
        sizes = {"z": (n, q, w), "matrix": (p, q), "bias": (p * w,) if biased else None}
        compare(native.mix, mix, dtype, sizes, small=("matrix",))


@DTYPES
@pytest.mark.parametrize("inner", [2, 4, 8, 16])
def test_gather(inner, dtype):
    for n, rows, m in [(1, 16, 1), (2, 48, 3), (3, 192, 16), (129, 32, 2)]:
        sizes = {"x": (n, rows * inner), "b": (m, inner)}
        compare(native.gather, gather, dtype, sizes, rows, small=("b",))


@DTYPES
@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_spread(m, dtype):
    for n, rows in [(1, 16), (2, 48), (3, 192), (129, 32)]:
        compare(native.spread, spread, dtype, {"z": (n, m, rows), "bias": (rows * m,)})
        given, moved = compare(native.spread, spread, dtype, {"z": (n, m, rows), "bias": None})
        assert torch.equal(moved, spread(given["z"], None))


@DTYPES
@pytest.mark.parametrize("call", [native.mix, native.spread], ids=["mix", "spread"])
def test_out_is_written_and_nothing_beside_it(call, dtype):
    z, bias = torch.randn(3, 4, 32).to(dtype), torch.randn(128).to(dtype)
    rest = (torch.randn(4, 4), bias) if call is native.mix else (bias,)
    around = torch.full((5, 128), 7.0, dtype=dtype)
    found = call(z, *rest, around[1:4])
    assert found.data_ptr() == around[1].data_ptr()
    assert torch.equal(bits(around[1:4]), bits(call(z, *rest)))
    assert (around[0] == 7).all()
    assert (around[4] == 7).all()


# ffn_middle: (k, m) of (1, 1), (2, 2), (4, 4) and (8, 8) has code of its own.
@DTYPES
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 2), (4, 4), (8, 8), (2, 4), (3, 1), (5, 7)])
def test_ffn_middle(k, m, biased, dtype):
    for n, wide, w in [(1, 1, 16), (2, 16, 48), (3, 5, 192), (129, 8, 48)]:
        sizes = {"z": (n, k, w), "up": (wide, k), "bias": (wide * w,) if biased else None}
        sizes["down"] = (m, wide)
        compare(native.ffn_middle, ffn_middle, dtype, sizes, small=("up", "down"))


@DTYPES
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("n", "w"), [(1, 16), (2, 48), (3, 192), (129, 48)])
def test_bias_gelu(n, w, biased, dtype):
    x, bias = (2 * normal(n, w)).to(dtype), normal(w).to(dtype) if biased else None
    exact = bias_gelu(x.double(), None if bias is None else bias.double())
    eager, around = bias_gelu(x, bias), torch.full((n + 2, w), 7.0, dtype=dtype)
    around[1:-1] = x
    found = native.bias_gelu_(around[1:-1], bias)
    assert found.data_ptr() == around[1].data_ptr()
    assert_rounds_no_worse(found, eager, exact)
    assert (around[0] == 7).all()
    assert (around[-1] == 7).all()


def test_gelu_over_its_range():
    """Of every size from -12 to 12, absolutely (torch's own: 9.9e-7) and beside torch's."""
    x = torch.linspace(-12, 12, 2**16)
    exact = F.gelu(x.double())
    found = native.bias_gelu_(x.clone()[None], None)[0]
    torch.testing.assert_close(found.double(), exact, rtol=2**-22, atol=1e-6)
    assert_rounds_no_worse(found, F.gelu(x), exact)
    rising = found[x > -0.7].diff()
    assert (rising >= 0).all()


def test_gelu_of_what_is_far_out():
    x = torch.tensor([-1e30, -100.0, -6.0, -0.0, 0.0, 6.0, 100.0, 1e30, INF, -INF, NAN, 3e38])
    found = native.bias_gelu_(F.pad(x, (0, 4))[None].contiguous(), None)[0, :12]
    expected = torch.tensor([0.0, 0, 0, 0, 0, 6, 100, 1e30, INF, NAN, NAN, 3e38])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@DTYPES
@pytest.mark.parametrize("w", [16, 48, 192])
@pytest.mark.parametrize("n", [1, 2, 3, 129])
def test_add_norm(n, w, dtype):
    for biased, summed, shifted in itertools.product((True, False), repeat=3):
        sizes = {"x": (n, w), "bias": (w,) if biased else None}
        sizes |= {"residual": (n, w) if summed else None}
        sizes |= {"weight": (w,), "shift": (w,) if shifted else None}
        compare(native.add_norm, add_norm, dtype, sizes, 1e-5)


def test_add_norm_of_large_means_and_of_constants():
    """The squares are of differences from the mean; eps counts where nothing differs."""
    x = (1e3 + normal(5, 48)).float()
    weight = torch.rand(48) + 1
    exact = F.layer_norm(x.double(), (48,), weight.double(), None, 1e-12)
    eager = F.layer_norm(x, (48,), weight, None, 1e-12)
    found = native.add_norm(x, None, None, weight, None, 1e-12)
    assert_rounds_no_worse(found, eager, exact)
    same = native.add_norm(torch.full((2, 3, 16), 2.0), None, None, torch.ones(16), None, 1e-5)
    assert same.shape == (2, 3, 16)
    assert not same.any()
    little = torch.tensor([1e-4, -1e-4]).repeat(8)[None]
    found = native.add_norm(little, None, None, torch.ones(16), None, 1e-6)
    torch.testing.assert_close(found, F.layer_norm(little, (16,), eps=1e-6))


def test_gelu_and_its_slope():
    x = torch.cat([torch.linspace(-12, 12, 4800), 5 * torch.randn(3184)]).view(-1, 16)
    x[0, :5] = torch.tensor([0.0, -0.0, -40.0, 40.0, NAN])
    slope = torch.randn_like(x)
    exact = x.double().requires_grad_(True)
    y = F.gelu(exact)
    (wanted,) = torch.autograd.grad(y, exact, slope.double())
    native.gelu_slope_(x, slope)
    for found, own in ((x, y.detach()), (slope, wanted)):
        torch.testing.assert_close(found.double(), own, rtol=1e-6, atol=2e-6, equal_nan=True)


# Attention.


def run(query, key, value, biases, mask, heads, scale):
    """With the mask as the kernel takes it: its rows to a multiple of 16."""
    if mask is not None:
        mask = F.pad(mask, (0, -mask.shape[-1] % native.LANES), value=NAN).contiguous()
        mask = torch.where(mask.isnan(), 0.0, mask)
    return native.attention(query, key, value, biases, mask, heads, scale)


def attends(batch, tokens, heads, d, mask, biased=(True, True, True), dtype=torch.float32):
    mask = None if mask is None else mask.to(dtype).float()
    sizes = dict.fromkeys(("query", "key", "value"), (batch, tokens, heads * d))
    names = ("query's", "key's", "value's")
    sizes |= {name: (heads * d,) if one else None for name, one in zip(names, biased, strict=True)}

    def call(attention, mask):
        return lambda q, k, v, *biases: attention(q, k, v, biases, mask, heads, 0.9 * d**-0.5)

    before = None if mask is None else mask.clone()
    _, found = compare(
        call(run, mask), lambda *x: call(attention, to(mask, x[0]))(*x), dtype, sizes
    )
    assert mask is None or torch.equal(mask, before)
    return found


def to(mask, like):
    return None if mask is None else mask.to(like.dtype)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 9, 16, 77, 128, 130])
@pytest.mark.parametrize("d", [16, 32, 48, 64, 128])
def test_attention(d, tokens, dtype):
    attends(2, tokens, 3, d, None, dtype=dtype)
    padding = torch.zeros(2, 1, tokens)
    padding[1, 0, (tokens + 1) // 2 :] = -INF
    attends(2, tokens, 3, d, padding, dtype=dtype)
    if tokens > 1:  # of one query, both are the same
        attends(2, tokens, 2, d, normal(2, tokens, tokens), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("biased", list(itertools.product((True, False), repeat=3)))
def test_attention_biases(biased, dtype):
    attends(2, 9, 3, 32, None, biased, dtype)


def test_attention_masks_per_query():
    """A triangle: query i sees i + 1 keys; the first is the first value, bias and all."""
    tokens, d = 19, 16
    triangle = torch.full((2, tokens, tokens), -INF).triu(1)
    attends(2, tokens, 2, d, triangle)
    x, bias = torch.randn(2, tokens, d), torch.randn(d)
    y = run(x, x, x, (None, None, bias), triangle, 1, 0.25)
    torch.testing.assert_close(y[:, 0], x[:, 0] + bias)


def test_a_query_that_sees_nothing_gets_zero():
    """As torch's does; with a bias too, as no value is added up."""
    tokens, d = 21, 32
    mask = torch.zeros(2, tokens, tokens)
    mask[0, 5], mask[1, :, :] = -INF, -INF
    found = attends(2, tokens, 2, d, mask)
    assert not found[0, 5].any()
    assert not found[1].any()
    assert found[0, 4].all()
    padding = torch.zeros(2, 1, tokens)
    padding[1] = -INF
    found = attends(2, tokens, 2, d, padding)
    assert not found[1].any()


def test_attention_takes_large_scores():
    """Softmax subtracts the largest: scores of hundreds neither overflow nor vanish."""
    for scale in (50.0, 1e4):
        x = torch.randn(1, 40, 32)
        found = run(x, x, x, (None, None, None), None, 2, scale)
        exact = attention(x.double(), x.double(), x.double(), (None, None, None), None, 2, scale)
        eager = attention(x, x, x, (None, None, None), None, 2, scale)
        assert_rounds_no_worse(found, eager, exact)


def test_attention_passes_nan_on():
    """As softmax does, for a query too, of which torch's attention with AVX512 makes 0, and with
    AVX2 NaN lies elsewhere in it."""
    x, nowhere = torch.randn(2, 9, 32), torch.zeros(2, 9, 32, dtype=torch.bool)
    one_query, every_query, one_column = nowhere.clone(), nowhere.clone(), nowhere.clone()
    one_query[0, 4, 16:] = True  # of the second head
    every_query[0, :, 16:] = True
    one_column[0, :, 20] = True
    for place, expected in (("query", one_query), ("key", every_query), ("value", one_column)):
        three = {name: x.clone() for name in ("query", "key", "value")}
        three[place][0, 4, 20] = NAN  # the second head of the first sequence
        found = run(*three.values(), (None, None, None), None, 2, 0.2)
        assert torch.equal(found.isnan(), expected), place
        if place != "query" and torch.backends.cpu.get_cpu_capability() == "AVX512":
            torchs = attention(*three.values(), (None, None, None), None, 2, 0.2)
            assert torch.equal(found.isnan(), torchs.isnan()), place


# What every function keeps to.


def everything(dtype, n):
    """name -> what every function makes of the same n rows."""
    torch.manual_seed(1)
    x, wide = torch.randn(n, 192).to(dtype), torch.randn(768).to(dtype)
    matrix, residual = torch.randn(4, 4), torch.randn(n, 192).to(dtype)
    z = x.view(n, 4, 48)
    narrow = wide[:192].contiguous()
    found = {
        "mix": native.mix(z, matrix, narrow),
        "mix of any": native.mix(x.view(n, 12, 16), torch.randn(3, 12), None),
        "gather": native.gather(x, matrix, 48),
        "spread": native.spread(z, narrow),
        "ffn_middle": native.ffn_middle(z, torch.randn(16, 4), wide, torch.randn(4, 16)),
        "ffn_middle of any": native.ffn_middle(z, torch.randn(5, 4), None, torch.randn(3, 5)),
        "bias_gelu": native.bias_gelu_(x.clone(), narrow),
        "add_norm": native.add_norm(x, narrow, residual, narrow, narrow, 1e-5),
    }
    if n:
        y, biases = x[None].contiguous(), (narrow, narrow, narrow)
        found["attention"] = native.attention(y, y, y, biases, None, 4, 0.2)
        if dtype == torch.float32:
            mask = torch.zeros(1, 1, n + -n % 16)
            mask[..., n // 2 + 1 : n] = -INF
            slopes = native.attention_backward(y, y, y, mask, 4, 0.2, y)
            found |= zip(("dq", "dk", "dv"), slopes, strict=True)
    if dtype == torch.float32:
        found["gelu"], found["its slope"] = x.clone(), residual.clone()
        native.gelu_slope_(found["gelu"], found["its slope"])
    return found


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_width(lanes, tmp_path, monkeypatch):
    """What other processors have: 4 numbers to a register (ARM), 8 (AVX2), 16 (AVX512)."""
    cases = [(dtype, n) for dtype in native.DTYPES for n in (1, 7, 129)]
    own = [everything(*case) for case in cases]
    monkeypatch.setenv("KRONBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, f"-DLANES={lanes}"))
    monkeypatch.setattr(native, "library", native.cache(native.library.__wrapped__))
    for case, kept in zip(cases, own, strict=True):
        rtol, atol = (1e-4, 5e-5) if case[0] == torch.float32 else (0.02, 1e-4)
        for name, found in everything(*case).items():
            torch.testing.assert_close(
                found, kept[name], rtol=rtol, atol=atol, msg=lambda said, name=name: name + said
            )
    assert list(tmp_path.iterdir())


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 3, 129])
def test_threads_change_no_bit(n, dtype):
    torch.set_num_threads(1)
    alone = everything(dtype, n)
    for count in (2, 3):
        torch.set_num_threads(count)
        for name, found in everything(dtype, n).items():
            assert torch.equal(bits(found), bits(alone[name])), f"{name}, {count} threads"


@DTYPES
def test_no_rows(dtype):
    for name, found in everything(dtype, 0).items():
        assert found.numel() == 0, name


@DTYPES
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_no_number_stays_in_its_row(value, dtype):
    """NaN and infinities come out where the definition has them, and nowhere else."""
    x = torch.randn(3, 4, 48).to(dtype)
    x[1, 2, 17] = value
    flat, up, down = x.view(3, 192), torch.randn(8, 4), torch.randn(2, 8)
    weight = torch.rand(192).to(dtype) + 1
    wide = flat.double()
    cases = {
        "mix": (native.mix(x, up, None), mix(x.double(), up.double(), None)),
        "gather": (native.gather(flat, up, 48), gather(wide, up.double(), 48)),
        "spread": (native.spread(x, None), spread(x.double(), None)),
        "ffn_middle": (
            native.ffn_middle(x, up, None, down),
            ffn_middle(x.double(), up.double(), None, down.double()),
        ),
        "bias_gelu": (native.bias_gelu_(flat.clone(), None), F.gelu(wide)),
        "add_norm": (
            native.add_norm(flat, None, None, weight, None, 1e-5),
            add_norm(wide, None, None, weight.double(), None, 1e-5),
        ),
    }
    for name, (found, exact) in cases.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found), kind(exact)), f"{name}, {kind}"
        assert not found.isfinite().all(), name


def test_bfloat16_rounds_to_nearest_even():
    """Every bfloat16 number there is, times one with a bit more, as torch rounds the product."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    ties = 0
    for factor in (1.0, 1 + 2**-8, 1 + 2**-9, 1.5, 3.0, 2.0**-20):
        found = native.mix(every.view(64, 1, 1024), torch.tensor([[factor]]), None).flatten()
        product = every.float() * factor
        expected = product.bfloat16()
        assert torch.equal(found.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(found[numbers], expected[numbers])
        ties += ((product.view(torch.int32) & 0xFFFF) == 0x8000).sum().item()
    assert ties > 1000


def test_every_nan_stays_one_in_bfloat16():
    """Rounded as a number is, one whose bits are all set would carry into -0."""
    nans = torch.tensor([[0x7FFFFFFF], [-1], [0x7F800001]], dtype=torch.int32).view(torch.float32)
    assert native.mix(torch.ones(1, 1, 16).bfloat16(), nans, None).isnan().all()
