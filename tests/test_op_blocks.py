"""The fused layers' ops: any strides, gradients, compile, autocast, and calls that do not fit."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kronbert import op_blocks
from kronbert.errors import KronbertError, ShapeError
from kronbert.shapes import KroneckerShape

pytest.importorskip("triton", reason="Triton is published for Linux only")

from kronbert.kernels import norm
from tests.block_checks import check, ffn_definition, ffn_inputs, mask_of
from tests.kernel_operands import DEVICE, EPS, affine, leaves, matrices, normal, seed


def residual_call(p=0.0):
    weight, bias = affine(20, torch.float32)
    tensors = leaves([normal(3, 4, 20), normal(3, 4, 20), weight, bias])

    def call(x, residual, weight, bias):
        drawn = seed() if p else None
        return op_blocks.residual_norm(x, residual, weight, bias, EPS, p=p, seed=drawn)

    def definition(linear, x, residual, weight, bias):
        mask = mask_of(12, 20, p, seed()).view(x.shape).to(x.dtype) if p else 1.0
        return F.layer_norm(residual + x * mask, (20,), weight, bias, EPS)

    return call, definition, tensors


def linear_call(*texts, p=0.0):
    first = KroneckerShape.parse(texts[0])
    width, groups = first.out_features, len(texts)
    a, b = zip(*(matrices(text, torch.float32) for text in texts), strict=True)
    residual, shift = normal(2, 3, width), normal(width)
    x = normal(2, 3, first.in_features)
    tensors = leaves([x, shift, residual, *affine(width, torch.float32), *a, *b])

    def call(x, shift, residual, weight, bias, *terms):
        a, b = terms[:groups], terms[groups:]
        drawn = seed() if p else None
        return op_blocks.linear_norm(x, a, b, shift, residual, weight, bias, EPS, p=p, seed=drawn)

    def definition(linear, x, shift, residual, weight, bias, *terms):
        y = linear(x, terms[:groups], terms[groups:], shift)
        mask = mask_of(6, width, p, seed()).view(y.shape).to(y.dtype) if p else 1.0
        return F.layer_norm(residual + y * mask, (width,), weight, bias, EPS)

    return call, definition, tensors


def ffn_call(p=0.0):
    inputs = ffn_inputs("4x2*16x24", "2x4*24x16", 4, torch.float32)
    tensors = leaves([inputs[0].view(2, 2, 48), *inputs[1:]])

    def call(*tensors):
        return op_blocks.ffn_norm(*tensors, EPS, p=p, seed=seed() if p else None)

    def definition(linear, x, *rest):
        mask = mask_of(4, 48, p, seed()) if p else 1.0
        return ffn_definition(mask)(linear, x.view(4, 48), *rest).view(x.shape)

    return call, definition, tensors


CALLS = {
    "residual": residual_call,
    "residual dropout": lambda: residual_call(0.4),
    "linear fused": lambda: linear_call("2x4*16x24"),
    "linear fused dropout": lambda: linear_call("16x24*2x4", p=0.4),
    "linear in two": lambda: linear_call("4x6*5x7", p=0.4),
    "linear groups": lambda: linear_call("2x4*16x24", "32x96*1x1"),
    "ffn": ffn_call,
    "ffn dropout": lambda: ffn_call(0.4),
}


@pytest.mark.parametrize("name", CALLS)
def test_op_is_its_definition(name):
    call, definition, tensors = CALLS[name]()
    y = call(*tensors)
    dy = normal(*y.shape)
    gradients = torch.autograd.grad(y, tensors, dy)
    check([y, *gradients], definition, tensors, dy, [str(i) for i in range(len(tensors))])


@pytest.mark.parametrize("name", CALLS)
def test_without_gradients_nothing_is_kept_and_nothing_changes(name):
    call, _, tensors = CALLS[name]()
    y = call(*tensors)
    with torch.no_grad():
        assert torch.equal(call(*tensors), y)
    assert torch.equal(call(*(t.detach() for t in tensors)), y)


@pytest.mark.parametrize("name", CALLS)
def test_op_takes_any_strides(name):
    call, _, tensors = CALLS[name]()
    y = call(*tensors)
    dy = normal(*y.shape)
    expected = torch.autograd.grad(y, tensors, dy)
    spread = [torch.stack([t.detach()] * 2, -1)[..., 0].requires_grad_() for t in tensors]
    assert not spread[0].is_contiguous()
    again = call(*spread)
    assert torch.equal(again, y)
    for one, other in zip(
        torch.autograd.grad(again, spread, torch.stack([dy] * 2, -1)[..., 0]), expected, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["residual dropout", "linear groups", "ffn dropout"])
def test_op_compiles_whole(name):
    call, _, tensors = CALLS[name]()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    y, again = call(*tensors), compiled(*tensors)
    assert torch.equal(y, again)
    dy = normal(*y.shape)
    for one, other in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(again, tensors, dy), strict=True
    ):
        assert torch.equal(one, other)


def op_arguments(name, p, keep):
    """Arguments of ``kronbert::<name>`` as it is registered, with gradients."""
    drawn = seed() if p else None
    if name == "residual_norm":
        tensors = leaves([normal(3, 12), normal(3, 12), *affine(12, torch.float32)])
        return (*tensors, EPS, p, drawn, keep)
    if name == "linear_norm":
        a, b = matrices("2x4*16x24", torch.float32)
        x, shift, residual = normal(3, 96), normal(32), normal(3, 32)
        x, a, b, shift, residual, *rest = leaves(
            [x, a, b, shift, residual, *affine(32, torch.float32)]
        )
        return (x, [a], [b], shift, residual, *rest, EPS, p, drawn, keep)
    tensors = leaves(ffn_inputs("4x2*16x24", "2x4*24x16", 3, torch.float32))
    return (*tensors, EPS, "gelu", p, drawn, keep)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["residual_norm", "linear_norm", "ffn_norm"])
def test_opcheck(name, p):
    torch.library.opcheck(getattr(torch.ops.kronbert, name).default, op_arguments(name, p, True))


def test_opcheck_of_what_is_not_kept():
    with torch.no_grad():
        for name in ("residual_norm", "linear_norm", "ffn_norm"):
            arguments = [
                a.detach() if isinstance(a, torch.Tensor) else a
                for a in op_arguments(name, 0.0, False)
            ]
            if name == "linear_norm":
                arguments[1:3] = [[one.detach() for one in group] for group in arguments[1:3]]
            torch.library.opcheck(getattr(torch.ops.kronbert, name).default, tuple(arguments))


def test_plain_layer_norm_keeps_x_alone():
    x, weight = normal(3, 12), affine(12, torch.float32)[0]
    op = torch.ops.kronbert.residual_norm
    torch.library.opcheck(
        op.default, (x.requires_grad_(), None, weight, None, EPS, 0.0, None, True)
    )
    _, total, mean, _ = op(x, None, weight, None, EPS, 0.0, None, True)
    assert (total.numel(), mean.numel()) == (0, 3)
    call = op_blocks.residual_norm(x, None, weight, None, EPS)
    (ours,) = torch.autograd.grad(call.pow(3).sum(), x)
    expected = F.layer_norm(x, (12,), weight, None, EPS)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.pow(3).sum(), x)[0])


@pytest.mark.parametrize("name", ["residual", "linear fused", "ffn"])
def test_second_derivative_is_refused(name):
    call, _, tensors = CALLS[name]()
    y = call(*tensors)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), tensors[0], create_graph=True)
    with pytest.raises(KronbertError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["residual_norm", "linear_norm", "ffn_norm"])
def test_gradient_of_what_was_not_kept_is_refused(name):
    with pytest.raises(KronbertError, match=f"{name}: a gradient was asked for with keep=False"):
        getattr(torch.ops.kronbert, name)(*op_arguments(name, 0.0, False))


@pytest.mark.parametrize("name", ["residual", "linear groups", "ffn dropout"])
def test_autocast_casts_what_goes_in(name):
    call, _, tensors = CALLS[name]()
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = call(*tensors)
    assert y.dtype == torch.float16
    halves = [t.detach().half() for t in tensors]
    assert torch.equal(y, call(*halves))
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), tensors), tensors, strict=True):
        assert gradient.dtype == tensor.dtype == torch.float32
    for registered in ("residual_norm", "linear_norm", "ffn_norm"):
        for key in ("AutocastCUDA", "AutocastCPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kronbert::{registered}", key)


def test_only_what_needs_a_gradient_gets_one():
    call, _, tensors = linear_call("2x4*16x24")
    frozen = [t.detach() for t in tensors]
    frozen[2].requires_grad_()
    call(*frozen).sum().backward()
    assert frozen[2].grad is not None
    assert all(t.grad is None for i, t in enumerate(frozen) if i != 2)


def test_wrong_calls_are_named():
    x, weight = normal(3, 12), normal(12)
    with pytest.raises(KronbertError, match=r"p=0.1 needs seed, an int64 tensor of one element"):
        op_blocks.residual_norm(x, None, weight, None, EPS, p=0.1)
    with pytest.raises(KronbertError, match=r"p=1.5: expected a probability"):
        op_blocks.residual_norm(x, None, weight, None, EPS, p=1.5, seed=seed())
    with pytest.raises(ShapeError, match=r"x \(3, 12\): expected \(3, 11\)"):
        op_blocks.residual_norm(x, None, weight[:11], None, EPS)
    with pytest.raises(ShapeError, match=r"residual \(2, 12\): expected \(3, 12\)"):
        op_blocks.residual_norm(x, x[:2], weight, None, EPS)
    with pytest.raises(ShapeError, match=r"x is torch.float64: expected .* one of float32"):
        op_blocks.residual_norm(x.double(), None, weight, None, EPS)
    with pytest.raises(ShapeError, match=r"residual is torch.float16: expected x's torch.float32"):
        op_blocks.residual_norm(x, x.half(), weight, None, EPS)
    with pytest.raises(ShapeError, match=r"width 5000: .* F|layer_norm for wider"):
        op_blocks.residual_norm(normal(1, 5000), None, normal(5000), None, EPS)
    with pytest.raises(ShapeError, match=r"x \(12, 3\) is not contiguous: pass x.contiguous"):
        norm.residual_norm(x.mT, None, weight[:3].contiguous(), None, EPS)
    inputs = ffn_inputs("4x2*16x24", "2x4*24x16", 1, torch.float32)
    with pytest.raises(ShapeError, match=r"activation='relu': expected None, 'gelu'"):
        op_blocks.ffn_norm(*inputs, EPS, activation="relu")


def test_import_loads_no_triton():
    code = "import sys; import kronbert.op_blocks; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
