"""The CPU engine sees every change of a layer it keeps something of."""

import pytest
import torch
from torch import nn

from kronbert import KroneckerLinear, KroneckerShape, ShapeError, cpu, functional
from tests.kept_layers import CLOSE, definition, is_right, new

pytestmark = pytest.mark.usefixtures("nothing_kept")


def step(optimizer, **more):
    def change(layer):
        with torch.enable_grad():
            layer(torch.randn(3, 28)).square().sum().backward()
        optimizer(layer.parameters(), lr=0.1, **more).step()

    return change


def write(name, how):
    def change(layer):
        with torch.no_grad():
            how(getattr(layer, name))

    return change


def give(name):
    def change(layer):
        getattr(layer, name).data = torch.randn_like(getattr(layer, name))

    return change


def replace(name):
    return lambda layer: setattr(layer, name, nn.Parameter(torch.randn_like(getattr(layer, name))))


def load(**more):
    return lambda layer: layer.load_state_dict(new().state_dict(), **more)


def behind(then):
    """A write that torch does not count, and what makes it seen."""

    def change(layer):
        layer.b.data.mul_(3)
        then(layer)

    return change


def write_in_inference_mode(layer):
    with torch.inference_mode():
        layer.a.mul_(2)


CHANGES = {
    "sgd": step(torch.optim.SGD),
    "adamw": step(torch.optim.AdamW),
    "adamw, foreach": step(torch.optim.AdamW, foreach=True),
    "adamw, fused": step(torch.optim.AdamW, fused=True),
    "a in place": write("a", lambda t: t.mul_(1.5)),
    "part of b in place": write("b", lambda t: t[1, 2:4].add_(1)),
    "bias in place": write("bias", lambda t: t.add_(1)),
    "in inference mode": write_in_inference_mode,
    "initialised": write("b", nn.init.xavier_uniform_),
    "reset": lambda layer: layer.reset_parameters(),
    "state dict": load(),
    "state dict, assigned": load(assign=True),
    "a.data given": give("a"),
    "b.data given": give("b"),
    "bias.data given": give("bias"),
    "a replaced": replace("a"),
    "b replaced": replace("b"),
    "bias replaced": replace("bias"),
    "bias taken away": lambda layer: setattr(layer, "bias", None),
    "there and back": lambda layer: write("a", lambda t: t.neg_())(layer.double().float()),
    "data, then train": behind(lambda layer: layer.train()),
    "data, then eval": behind(lambda layer: layer.eval()),
    "data, then the parent's eval": behind(lambda layer: nn.Sequential(layer).eval()),
    "data, then to": behind(lambda layer: layer.to(torch.float32)),
    "data, then forget": behind(lambda layer: cpu.forget(layer.parameters())),
    "data, then forget all": behind(lambda layer: cpu.forget()),
}


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, no_grad, pick):
    layer, x = new(), torch.randn(4, 28)
    with no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
    for _ in range(2):
        CHANGES[change](layer)
        with no_grad():
            is_right(layer, x)
            is_right(layer, x)
            changed = (layer(x) - before).abs().max() > 1e-3
            assert changed or change == "bias taken away" or "replaced" in change or _
    assert len(cpu._KEPT) == 1


def test_dtypes_take_turns(pick):
    layer, x = new(), torch.randn(4, 28)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32):
        layer.to(dtype)
        with torch.no_grad():
            for _ in range(2):
                y = layer(x.to(dtype))
                assert y.dtype == dtype
                expected = definition(layer, x.to(dtype))
                limit = 4 * torch.finfo(dtype).eps * expected.abs().max()
                assert (y.double() - expected).abs().max() <= limit


@pytest.mark.parametrize("n", [1, 5, 40])
def test_packed_matrices_follow_changes(n, pick):
    """In bfloat16, matrices of more than 32 x 32 are kept in oneDNN's layout."""
    layer = KroneckerLinear(80, 99, KroneckerShape(33, 40, 3, 2), dtype=torch.bfloat16)
    x = torch.randn(n, 80).bfloat16()
    for _ in range(3):
        with torch.no_grad():
            expected = definition(layer, x)
            limit = 0.02 * expected.abs().max()
            for given in (x, x, x.T.contiguous().T):
                assert (layer(given).double() - expected).abs().max() <= limit
            layer.a.copy_(torch.randn_like(layer.a))
            layer.b.neg_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_added_at_any_number_of_rows(dtype, pick):
    layer = new(dtype=dtype)
    with torch.no_grad():
        layer.bias.mul_(50)
        for n in (1, 2, 30, 400):
            x = torch.randn(n, 28).to(dtype)
            expected = definition(layer, x)
            dense = nn.functional.linear(x, layer.weight, layer.bias).double() - expected
            for _ in range(2):
                error = layer(x).double() - expected
                assert error.square().mean() <= 4 * dense.square().mean()


def test_one_set_of_matrices_with_a_bias_another_and_none(pick, monkeypatch):
    """Fused attention adds the bias itself up to some length, the layer does beyond it."""
    layer, x = new(), torch.randn(4, 28)
    made, runner = [], cpu._runner
    monkeypatch.setattr(cpu, "_runner", lambda *args: made.append(1) or runner(*args))
    a, b = layer.matrices("a"), layer.matrices("b")
    other = torch.randn(30)
    with torch.no_grad():
        plain = definition(layer, x) - layer.bias
        for bias in (layer.bias, None, layer.bias, other, None, layer.bias):
            for _ in range(2):
                y = functional.kron_linear(x, a, b, bias).double()
                expected = plain if bias is None else plain + bias
                torch.testing.assert_close(y, expected, **CLOSE)
        with pytest.raises(ShapeError, match="bias"):
            functional.kron_linear(x, a, b, torch.randn(29))
    assert made == [1]


@pytest.mark.parametrize("biased", [True, False])
def test_with_and_without_gradients_agree(biased, pick):
    layer, x = new(bias=biased), torch.randn(11, 28)
    grad = layer(x)
    assert grad.requires_grad
    with torch.no_grad():
        first, second = layer(x), layer(x)
    torch.testing.assert_close(first, grad.detach(), **CLOSE)
    assert torch.equal(first, second)
    assert not second.requires_grad


def test_kept_in_inference_mode_serves_training(pick):
    """Inference tensors cannot be saved for a backward pass."""
    layer, x = new(), torch.randn(4, 28)
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        y = layer(x)
    assert not y.is_inference()
    weight = torch.randn(30, requires_grad=True)
    (y * weight).sum().backward()
    layer(x).sum().backward()
    assert layer.a.grad.any()


def test_parameters_made_in_inference_mode_are_not_kept(pick):
    """They count no versions: a change would not be seen."""
    x = torch.randn(4, 28)
    with torch.inference_mode():
        layer = new()
        is_right(layer, x)
        assert not cpu._KEPT
        layer.a.mul_(2)
        is_right(layer, x)


@torch.no_grad()
def test_parameters_from_one_vector():
    """`nn.utils.vector_to_parameters` writes ``.data``; memory of the vector before last is free,
    and its address would be met again."""
    torch.manual_seed(0)
    shape = KroneckerShape(384, 48, 2, 16)
    layer, x = KroneckerLinear(768, 768, shape), torch.randn(16, 768)
    base = nn.utils.parameters_to_vector(layer.parameters())
    for _ in range(8):
        for vector in (base + 0.1 * torch.randn_like(base), base.clone()):
            nn.utils.vector_to_parameters(vector, layer.parameters())
            del vector
        nn.utils.vector_to_parameters(base + torch.randn_like(base), layer.parameters())
        is_right(layer, x)
    # Whether it is met is up to the allocator: what holds it is not.
    (one,) = cpu._KEPT.values()
    held = {storage.data_ptr() for storage in one.storages}
    assert held == {p.untyped_storage().data_ptr() for p in (layer.a, layer.b)}
