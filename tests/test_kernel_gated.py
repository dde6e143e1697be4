"""The kernels of layers that norm before their halves, and the blocks that use them."""

import pytest
import torch
import torch.nn.functional as F

from kronbert import blocks, cuda, functional, reference

pytest.importorskip("triton", reason="Triton is published for Linux only")

from kronbert.kernels import gated as gate
from kronbert.kernels import norm
from tests.gated_checks import FLOORS, check, gate_definition, mask_of, norm_definition, norm_inputs
from tests.kernel_operands import DEVICE, DTYPES, EPS, leaves, normal, rms, seed

# The gate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "width", "p"),
    [
        (17, 96, 0.0),
        (17, 200, 0.3),  # two blocks of columns, the second padded
        (5, 33, 0.6),
        (1, 1, 0.0),
        (0, 96, 0.3),
        (9, 1152, 0.1),
        (3, 130, 0.0),
    ],
)
def test_gated(dtype, n, width, p):
    pair, dy = normal(n, 2 * width, dtype=dtype, scale=2.0), normal(n, width, dtype=dtype)
    drop = {"p": p, "seed": seed() if p else None}
    y = gate.gated(pair, **drop)
    found = [y, gate.gated_backward(dy, pair, **drop)]
    assert y.dtype == found[1].dtype == dtype
    check(found, gate_definition(mask_of(n, width, p)), [pair], [dy], FLOORS[dtype])


def test_gated_rounds_once():
    """Eager rounds gelu(u) to half before it multiplies."""
    pair = normal(64, 256, dtype=torch.float16)
    u, g = pair.chunk(2, -1)
    exact = F.gelu(u.double()) * g.double()
    assert rms(gate.gated(pair) - exact) < 0.9 * rms(F.gelu(u) * g - exact)


def test_gated_fast_is_near_and_has_its_own_derivative():
    pair, dy = normal(4, 64), normal(4, 32)
    exact, fast = gate.gated(pair, "gelu"), gate.gated(pair, "gelu_fast")
    assert 0 < (exact - fast).abs().max() < 1e-3 * pair.abs().max()
    step = 1e-3 * normal(4, 64)
    ends = [gate.gated(pair + s * step, "gelu_fast") for s in (1, -1)]
    slope = ((ends[0] - ends[1]) / 2 * dy).double().sum().item()
    back = gate.gated_backward(dy, pair, "gelu_fast")
    assert (back * step).double().sum().item() == pytest.approx(slope, rel=2e-2)


def test_gated_of_no_activation_is_a_product():
    pair = normal(3, 20)
    u, g = pair.chunk(2, -1)
    torch.testing.assert_close(gate.gated(pair, None), u * g)


# The sum and its LayerNorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "width", "p", "bias"),
    [
        (17, 96, 0.0, False),
        (17, 96, 0.3, True),
        (5, 33, 0.0, True),
        (5, 33, 0.6, False),
        (1, 7, 0.0, False),
        (0, 96, 0.3, True),
        (3, 768, 0.1, False),
    ],
)
def test_add_norm(dtype, n, width, p, bias):
    tensors = norm_inputs(n, width, bias=bias, dtype=dtype)
    x, residual, weight, *rest = tensors
    shift = rest[0] if bias else None
    drop = {"p": p, "seed": seed() if p else None}
    out = norm.residual_norm(x, residual, weight, shift, EPS, **drop, keep=True, total=True)
    grads = [normal(n, width, dtype=dtype), normal(n, width, dtype=dtype)]
    back = norm.residual_norm_backward(
        grads[1], out.total, out.mean, out.rstd, weight, added=grads[0], **drop, has_bias=bias
    )
    found = [out.total, out.y, back.dx, back.dtotal, back.dweight]
    found += [back.dbias] if bias else []
    definition = norm_definition(mask_of(n, width, p))
    check(found, definition, tensors, grads, 10 * FLOORS[dtype])
    again = norm.residual_norm(x, residual, weight, shift, EPS, **drop, total=True)
    assert torch.equal(again.y, out.y)
    assert torch.equal(again.total, out.total)
    assert again.mean is None


# The blocks that use them


@pytest.fixture
def on_kernels(monkeypatch):
    """Blocks take the kernels' way on whatever device the tests have."""
    monkeypatch.setattr(cuda, "takes", lambda x: x.dtype in cuda.DTYPES)


def linear_of(out, inner, *, bias):
    b_out, b_in = 4, 3
    a, b = normal(2, out // b_out, inner // b_in, scale=0.3), normal(2, b_out, b_in, scale=0.3)
    return blocks.Linear([a], [b], normal(out) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_ffn_on_kernels(dtype, bias, on_kernels):
    x, dy = normal(2, 5, 12, dtype=dtype), normal(2, 5, 12, dtype=dtype)
    maps = [linear_of(72, 12, bias=bias), linear_of(12, 36, bias=bias)]
    tensors = [x, *(t.to(dtype) for m in maps for t in (m.a[0], m.b[0], m.bias) if t is not None)]

    def parts(x, *terms):
        half = len(terms) // 2
        for one in (terms[:half], terms[half:]):
            yield [one[0]], [one[1]], one[2] if bias else None

    def definition(x, *terms):
        linear = reference.kron_linear if x.dtype == torch.float64 else functional.kron_linear
        expand, contract = parts(x, *terms)
        u, g = linear(x, *expand).chunk(2, -1)
        return (linear(F.gelu(u) * g, *contract),)

    ours = leaves(tensors)
    y = blocks.gated_ffn(ours[0], *(blocks.Linear(*one) for one in parts(*ours)))
    found = [y, *torch.autograd.grad(y, ours, dy)]
    check(found, definition, tensors, [dy], 10 * FLOORS[dtype])


def test_blocks_pass_on_what_they_are_given(on_kernels, monkeypatch):
    seen = []

    def spy(pair, activation="gelu", *, p=0.0, seed=None):
        seen.append((activation, p, seed is not None))
        return pair.chunk(2, -1)[0].contiguous()

    monkeypatch.setattr(gate, "gated", spy)
    maps = linear_of(72, 12, bias=True), linear_of(12, 36, bias=True)
    halves = [blocks.Linear([m.a[0].half()], [m.b[0].half()], m.bias.half()) for m in maps]
    x = normal(3, 12)
    blocks.gated_ffn(x, *maps, gelu="fast")
    blocks.gated_ffn(x.half(), *halves, gelu="fast", dropout=0.2)
    assert seen == [("gelu", 0.0, False), ("gelu_fast", 0.2, True)]
    weight = torch.ones(12, device=DEVICE)
    kept = blocks.add_norm(
        torch.ones(400, 12, device=DEVICE),
        torch.zeros(400, 12, device=DEVICE),
        blocks.Norm(weight, None, EPS),
        dropout=0.25,
    )[0]
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((kept > 0).float().mean().item() - 0.75) < 0.03, "4,800 draws: 4.8 deviations"
