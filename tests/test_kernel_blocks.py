"""The fused-layer kernels against the float64 definitions and eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from kronbert import functional, op_blocks, reference
from kronbert.errors import ShapeError
from kronbert.presets import PRESETS
from kronbert.shapes import KroneckerShape

pytest.importorskip("triton", reason="Triton is published for Linux only")

from kronbert.kernels import ffn, ffn_hidden, linear_norm, norm
from tests.block_checks import FFN_NAMES, check, ffn_definition, ffn_inputs, mask_of
from tests.kernel_operands import DEVICE, DTYPES, EPS, affine, matrices, normal, rms, seed

# LayerNorm of a residual sum


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "width", "p", "given"),
    [
        (17, 96, 0.0, "residual bias shift"),  # 3 parts of 32
        (17, 96, 0.3, "residual bias shift"),
        (5, 33, 0.0, "residual"),  # padded to 64
        (5, 33, 0.6, "bias"),
        (1, 7, 0.0, ""),
        (1, 1, 0.0, "residual bias"),
        (0, 96, 0.3, "residual bias shift"),
        (3, 768, 0.1, "residual bias shift"),
        (2, 4096, 0.0, "residual bias"),
    ],
)
def test_residual_norm(dtype, n, width, p, given):
    x, dy = normal(n, width, dtype=dtype), normal(n, width, dtype=dtype)
    weight, bias = affine(width, dtype)
    tensors = {"x": x, "weight": weight}
    if "residual" in given:
        tensors["residual"] = normal(n, width, dtype=dtype)
    if "bias" in given:
        tensors["bias"] = bias
    if "shift" in given:
        tensors["shift"] = normal(width, dtype=dtype)
    mask = mask_of(n, width, p, seed()) if p else torch.ones(n, width, device=DEVICE)

    def definition(_, *leaves):
        t = dict(zip(tensors, leaves, strict=True))
        total = (t["x"] + t.get("shift", 0)) * mask.to(t["x"].dtype) + t.get("residual", 0)
        return F.layer_norm(total, (width,), t["weight"], t.get("bias"), EPS)

    rest = (tensors.get("residual"), weight, tensors.get("bias"), EPS)
    options = {"shift": tensors.get("shift"), "p": p, "seed": seed() if p else None}
    out = norm.residual_norm(x, *rest, **options, keep=True)
    total = x if out.total is None else out.total
    back = norm.residual_norm_backward(
        dy,
        total,
        out.mean,
        out.rstd,
        weight,
        p=p,
        seed=options["seed"],
        has_bias="bias" in tensors,
        has_shift="shift" in tensors,
        has_residual="residual" in tensors,
    )
    gradients = {
        "x": back.dx,
        "weight": back.dweight,
        "residual": back.dtotal,
        "bias": back.dbias,
        "shift": back.dshift,
    }
    assert {name for name, one in gradients.items() if one is not None} == set(tensors)
    found = [out.y, *(gradients[name] for name in tensors)]
    check(found, definition, list(tensors.values()), dy, list(tensors))
    assert torch.equal(norm.residual_norm(x, *rest, **options).y, out.y)


def test_dropout_mask():
    n, width, p = 64, 100, 0.3
    mask = mask_of(n, width, p, seed(1))
    values = mask.unique().tolist()
    assert values[0] == 0
    assert values[1:] == pytest.approx([1 / (1 - p)])
    kept = mask > 0
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 4 * deviation / (n * width) ** 0.5
    assert (kept.double().mean(0) - (1 - p)).abs().max() < 5 * deviation / n**0.5
    assert (kept.double().mean(1) - (1 - p)).abs().max() < 5 * deviation / width**0.5
    # Neighbours come from one Philox call, rows from neighbouring ones: not the same bits.
    for one, other in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
        agree = (one == other).double().mean()
        assert abs(agree - (p**2 + (1 - p) ** 2)) < 0.03
    assert torch.equal(mask, mask_of(n, width, p, seed(1)))
    assert not torch.equal(mask, mask_of(n, width, p, seed(2)))
    assert not torch.equal(mask, mask_of(n, width, p, seed(1 + 2**40)))
    assert torch.equal(mask[:9], mask_of(9, width, p, seed(1)))
    assert not mask_of(4, 8, 1.0, seed(1)).any()


def test_every_kernel_meets_the_same_mask():
    """Backward of a fused forward is the norm kernel: their masks must agree to the bit."""
    p, n = 0.4, 5
    expected = mask_of(n, 96, p, seed(3)) > 0
    ones = torch.ones(n, 96, device=DEVICE)
    for text, inner in (("2x4*48x32", 128), ("48x32*2x4", 128)):
        a, b = (torch.zeros_like(m) for m in matrices(text, torch.float32))
        out = linear_norm.linear_norm(
            normal(n, inner),
            a,
            b,
            ones[0],
            torch.zeros_like(ones),
            ones[0],
            None,
            EPS,
            p=p,
            seed=seed(3),
            keep=True,
        )
        assert torch.equal(out.total > 0, expected), text
    half = torch.ones(n, 128, device=DEVICE, dtype=torch.float16)
    pairs = (*matrices("4x2*32x64", half.dtype), *matrices("2x4*64x32", half.dtype))
    a1, b1, a2, b2 = (torch.zeros_like(m) for m in pairs)
    for path in ("whole", "phases"):
        out = ffn.ffn_norm(
            torch.zeros_like(half),
            a1,
            b1,
            None,
            a2,
            b2,
            half[0],
            half[0],
            None,
            EPS,
            p=p,
            seed=seed(3),
            keep=True,
            path=path,
        )
        assert torch.equal(out.total > 0, mask_of(n, 128, p, seed(3)) > 0), path


# A Kronecker linear map before it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("2x4*32x48", 17),
        ("2:2x4*48x32", 17),
        ("3x5*16x24", 3),  # 24 is no multiple of a step's depth
        ("48x24*2x16", 17),
        ("2:32x16*4x4", 17),
        ("48x32*1x3", 3),
        ("32x16*2x8", 1),
        ("32x16*2x8", 0),
        ("2x16*384x192", 3),
        ("384x48*2x16", 3),
        ("384x384*2x2", 3),
        ("2x8*384x384", 3),
    ],
)
def test_linear_norm(dtype, text, n):
    shape = KroneckerShape.parse(text)
    assert linear_norm.fits(shape, dtype)
    a, b = matrices(text, dtype)
    width = shape.out_features
    weight, bias = affine(width, dtype)
    x = normal(n, shape.in_features, dtype=dtype)
    inputs = [x, a, b, normal(width, dtype=dtype), normal(n, width, dtype=dtype), weight, bias]

    def definition(linear, x, a, b, shift, residual, weight, bias):
        return F.layer_norm(residual + linear(x, a, b, shift), (width,), weight, bias, EPS)

    out = linear_norm.linear_norm(*inputs, EPS, keep=True)
    results = []
    for kind, engine in ((torch.float64, reference), (dtype, functional)):
        results.append(definition(engine.kron_linear, *(t.to(kind) for t in inputs)))
    exact, eager = results
    assert rms(out.y - exact) <= 2 * rms(eager - exact) + 1e-8
    assert rms((out.y - bias) / weight - (out.total - out.mean[:, None]) * out.rstd[:, None]) < 2e-3
    assert torch.equal(linear_norm.linear_norm(*inputs, EPS).y, out.y)


def test_linear_norm_without_biases():
    a, b = matrices("2x4*32x48", torch.float32)
    x, weight = normal(5, 192), affine(64, torch.float32)[0]
    y = linear_norm.linear_norm(x, a, b, None, None, weight, None, EPS).y
    expected = F.layer_norm(reference.kron_linear(x, a, b), (64,), weight, None, EPS)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "16x2*192x384",  # 3,072 outputs
        "2x2*20x32",  # 20 columns are no multiple of 16
        "48x48*16x16",  # no small matrix
        "768x1*1x768",
        "16x48*48x16",  # b first is far cheaper
        "64x32*3x4",  # outputs interleave by powers of two only
        "4:1024x64*1x16",  # 128 KiB of four big matrices in steps of 16
    ],
)
def test_linear_norm_says_what_does_not_fit(text):
    shape = KroneckerShape.parse(text)
    assert not linear_norm.fits(shape, torch.float16)
    a, b = matrices(text, torch.float16)
    weight = normal(shape.out_features, dtype=torch.float16)
    x = normal(2, shape.in_features, dtype=torch.float16)
    with pytest.raises(ShapeError, match=r"does not fit one kernel. Use linear\(\) and residual"):
        linear_norm.linear_norm(x, a, b, None, None, weight, None, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "text",
    ["2x16*384x192", "4:2x16*384x192", "2:2x4*384x192", "2:2x2*512x512", "4:384x48*2x16"],
)
def test_steps_fit_the_smallest_cards(text, dtype):
    """Of 99 KiB of shared memory they leave the rest of a step 27."""
    shape = KroneckerShape.parse(text)
    run = linear_norm.plan(shape, dtype)
    if run is None:
        assert dtype == torch.float32
        assert shape.rank == 4
        return
    assert shape.rank * run.g_out * run.depth * dtype.itemsize <= 72 * 1024
    assert run.depth >= 16


@pytest.mark.parametrize("name", ["k8", "k19", "k21"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [384, 768])
def test_the_papers_shapes_fit(name, dtype, width):
    preset = PRESETS[name]
    assert linear_norm.fits(preset.attention.shape(width, width, name), dtype)
    contract = preset.contract.shape(width, 4 * width, name)
    assert linear_norm.fits(contract, dtype)
    assert ffn.fits(preset.expand.shape(4 * width, width, name), contract)


# The feed-forward block


@pytest.mark.parametrize(
    ("expand", "contract", "n", "dtype", "path", "p"),
    [
        ("4x2*32x64", "2x4*64x32", 17, torch.float16, "whole", 0.0),
        ("4x2*32x64", "2x4*64x32", 5, torch.float16, "whole", 0.3),
        ("4x2*96x192", "2x4*192x96", 5, torch.float16, "whole", 0.0),  # blocks of 32 and 64
        ("2:4x2*16x32", "2:2x4*32x16", 5, torch.float32, "phases", 0.3),
        ("4x2*32x64", "2x4*64x32", 17, torch.float32, "phases", 0.0),
        ("8x2*32x64", "2x8*64x32", 3, torch.float16, "phases", 0.3),
        ("2:6x3*10x7", "2:3x6*7x10", 5, torch.float32, "phases", 0.3),
        ("2:6x3*10x7", "2:3x6*7x10", 5, torch.float16, "phases", 0.0),
        ("2:16x2*16x24", "3:2x16*24x16", 3, torch.float32, "phases", 0.0),  # sums in two launches
        ("8x2*32x64", "2x8*64x32", 1, torch.float32, "phases", 0.0),
        ("8x2*32x64", "2x8*64x32", 0, torch.float32, "phases", 0.3),
        ("8x2*32x64", "2x8*64x32", 0, torch.float16, "whole", 0.3),
        ("16x2*192x384", "2x16*384x192", 2, torch.float16, "whole", 0.0),
        ("8x2*384x384", "2x8*384x384", 2, torch.float32, "phases", 0.0),
    ],
)
def test_ffn_norm(expand, contract, n, dtype, path, p):
    inputs = ffn_inputs(expand, contract, n, dtype)
    x, a1, b1, bias1, a2, b2, _, weight, _ = inputs
    drawn = seed() if p else None
    out = ffn.ffn_norm(*inputs, EPS, p=p, seed=drawn, keep=True, path=path)
    dy = normal(*x.shape, dtype=dtype)
    kept = (x, out.z, out.total, out.mean, out.rstd)
    back = ffn.ffn_norm_backward(dy, *kept, a1, b1, bias1, a2, b2, weight, p=p, seed=drawn)
    mask = mask_of(*x.shape, p, drawn) if p else 1.0
    check([out.y, *back], ffn_definition(mask), inputs, dy, FFN_NAMES)
    assert torch.equal(ffn.ffn_norm(*inputs, EPS, p=p, seed=drawn, path=path).y, out.y)
    again = ffn.ffn_norm_backward(dy, *kept, a1, b1, bias1, a2, b2, weight, p=p, seed=drawn)
    assert all(torch.equal(one, other) for one, other in zip(back, again, strict=True))


def test_ffn_norm_without_biases():
    inputs = ffn_inputs("4x2*16x24", "2x4*24x16", 3, torch.float32)
    x, a1, b1, _, a2, b2, _, weight, _ = inputs
    out = ffn.ffn_norm(x, a1, b1, None, a2, b2, None, weight, None, EPS, keep=True)
    dy = normal(*x.shape)
    kept = (x, out.z, out.total, out.mean, out.rstd)
    back = ffn.ffn_norm_backward(
        dy, *kept, a1, b1, None, a2, b2, weight, has_bias2=False, has_bias=False
    )
    assert [back.dbias1, back.dbias2, back.dbias] == [None] * 3

    def definition(linear, x, a1, b1, a2, b2, weight):
        return ffn_definition()(linear, x, a1, b1, None, a2, b2, None, weight, None)

    found = [out.y, back.dx, back.da1, back.db1, back.da2, back.db2, back.dweight]
    check(found, definition, [x, a1, b1, a2, b2, weight], dy, FFN_NAMES[:6])


def test_gelu_fast_is_near_and_has_its_own_derivative():
    z, du = normal(4, 2, 1, 32), normal(4, 2, 1, 32)
    a1, a2, bias1 = normal(1, 4, 2), normal(1, 2, 4), normal(128)
    exact = ffn_hidden.hidden_mix(z, a1, bias1, a2, "gelu")
    fast = ffn_hidden.hidden_mix(z, a1, bias1, a2, "gelu_fast")
    assert 0 < (exact - fast).abs().max() < 1e-3 * a2.abs().sum(2).max()
    back = ffn_hidden.hidden_mix_backward(z, du, a1, bias1, a2, "gelu_fast")
    step = 1e-3 * normal(*z.shape)
    ends = [ffn_hidden.hidden_mix(z + s * step, a1, bias1, a2, "gelu_fast") for s in (1, -1)]
    slope = ((ends[0] - ends[1]) / 2 * du).double().sum()
    assert (back.dz * step).double().sum() == pytest.approx(slope.item(), rel=2e-2)


def test_one_table_names_the_path():
    k21 = [KroneckerShape.parse(text) for text in ("16x2*192x384", "2x16*384x192")]
    k8 = [KroneckerShape.parse(text) for text in ("8x2*384x384", "2x8*384x384")]
    assert ffn.path_of(*k21, torch.bfloat16) == "whole"
    assert ffn.path_of(*k21, torch.float32) == "phases"
    assert ffn.path_of(*k8, torch.bfloat16) == "phases"
    inputs = ffn_inputs("8x2*32x64", "2x8*64x32", 1, torch.float32)
    with pytest.raises(ShapeError, match=r"in torch.float32 do not fit one kernel: path='phases'"):
        ffn.ffn_norm(*inputs, EPS, path="whole")


@pytest.mark.parametrize(
    ("expand", "contract"),
    [
        ("16x2*24x48", "2x8*48x48"),  # other slices
        ("24x48*16x2", "48x24*2x16"),  # b small
        ("8x1*8x64", "8x8*8x8"),  # contract multiplies by b2 first
        ("8x2*32x64", "2x8*32x32"),  # other widths
    ],
)
def test_ffn_norm_says_what_does_not_fit(expand, contract):
    pair = KroneckerShape.parse(expand), KroneckerShape.parse(contract)
    assert not op_blocks.ffn_fits(*pair)
    inputs = ffn_inputs(expand, contract, 1, torch.float32)
    with pytest.raises(ShapeError, match=r"ffn_norm: .* Use linear\(\) with its activation"):
        op_blocks.ffn_norm(*inputs, EPS)
