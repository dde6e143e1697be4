"""Transformations, graphs, threads: nothing the CPU engine keeps becomes a constant of theirs."""

import gc
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from kronbert import cpu
from tests.kept_layers import CLOSE, definition, is_right, new

pytestmark = pytest.mark.usefixtures("nothing_kept")


@torch.no_grad()
def test_functional_call(warm):
    x = torch.randn(5, 28)
    other = new()
    y = torch.func.functional_call(warm, dict(other.named_parameters()), (x,))
    is_right(other, x, y)
    is_right(warm, x)
    scaled = {"a": 2 * warm.a.detach()}
    torch.testing.assert_close(
        torch.func.functional_call(warm, scaled, (x,)) - warm.bias,
        2 * (warm(x) - warm.bias),
        **CLOSE,
    )
    del y, scaled, other
    gc.collect()
    assert list(cpu._KEPT) == [id(warm.a)]


@pytest.mark.parametrize("grad", [True, False])
def test_vmap(warm, grad):
    x = torch.randn(6, 5, 28)
    with torch.set_grad_enabled(grad):
        is_right(warm, x, torch.vmap(warm)(x))
        is_right(warm, x, torch.vmap(torch.vmap(warm))(x))
        stacked = torch.stack([warm.a.detach(), 2 * warm.a.detach()])
        y = torch.vmap(lambda a: torch.func.functional_call(warm, {"a": a}, (x[0],)))(stacked)
        is_right(warm, x[0], y[0])


@pytest.mark.parametrize("grad", [True, False])
def test_jvp(warm, grad):
    x, along = torch.randn(5, 28), torch.randn(5, 28)
    with torch.set_grad_enabled(grad):
        y, tangent = torch.func.jvp(warm, (x,), (along,))
        is_right(warm, x, y)
        torch.testing.assert_close(tangent.detach(), (warm(along) - warm.bias).detach(), **CLOSE)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode(warm, grad):
    warm.requires_grad_(False)
    x, along = torch.randn(5, 28), torch.randn(5, 28)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(warm(forward_ad.make_dual(x, along)))
        is_right(warm, x, y)
        torch.testing.assert_close(tangent, warm(along) - warm.bias, **CLOSE)
        dual = forward_ad.make_dual(warm.a, torch.ones_like(warm.a))
        y = torch.func.functional_call(warm, {"a": dual}, (x,))
        tangent = forward_ad.unpack_dual(y).tangent
        ones = torch.func.functional_call(warm, {"a": torch.ones_like(warm.a)}, (x,)) - warm.bias
        torch.testing.assert_close(tangent, ones, **CLOSE)


def test_func_grad(warm):
    x = torch.randn(5, 28)
    with torch.no_grad():
        got = torch.func.grad(lambda x: warm(x).square().sum())(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(warm(x).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_fake_tensors(warm):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = warm(mode.from_tensor(torch.randn(5, 28)))
    assert y.shape == (5, 30)
    fake = mode.from_tensor(torch.randn(5, 28))
    with mode:
        layer = new()
        assert layer(fake).shape == (5, 30)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_holds_the_parameters_themselves(mode, warm):
    x = torch.randn(5, 28)
    graph = make_fx(warm, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    warm.a.mul_(2)
    warm.b.add_(1)
    is_right(warm, x, graph(x))


@torch.no_grad()
def test_make_fx_of_a_functional_call(warm):
    def call(x, parameters):
        return torch.func.functional_call(warm, parameters, (x,))

    x, parameters = torch.randn(5, 28), dict(warm.named_parameters())
    graph = make_fx(call, tracing_mode="fake")(x, parameters)
    warm.a.mul_(2)
    is_right(warm, x, graph(x, parameters))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of sizes
def test_jit_trace(warm):
    x = torch.randn(5, 28)
    traced = torch.jit.trace(warm, (x,))
    warm.a.mul_(2)
    warm.b.add_(1)
    is_right(warm, x, traced(x))
    is_right(warm, torch.randn(3, 28))


@pytest.mark.parametrize("grad", [True, False])
def test_compile(warm, grad):
    torch._dynamo.reset()
    compiled = torch.compile(warm, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for n in (5, 9):
            x = torch.randn(n, 28)
            is_right(warm, x, compiled(x))
            with torch.no_grad():
                warm.a.mul_(2)
                warm.b.add_(1)
            is_right(warm, x, compiled(x))
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False])
def test_export(warm, strict):
    x = torch.randn(5, 28)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(warm, (x,), dynamic_shapes=({0: rows},), strict=strict)
    assert not program.constants
    is_right(warm, torch.randn(9, 28), None)
    module = program.module()
    state = {name: torch.randn_like(value) for name, value in warm.state_dict().items()}
    warm.load_state_dict(state)
    module.load_state_dict(state)
    x = torch.randn(9, 28)
    torch.testing.assert_close(module(x).double(), definition(warm, x), rtol=1e-5, atol=1e-3)


def test_threads(warm):
    wrong, inputs = [], [torch.randn(n, 28) for n in (5, 6, 9, 17)]
    expected = [definition(warm, x) for x in inputs]

    @torch.no_grad()
    def call(first):
        for i in range(first, first + 150):
            x, y = inputs[i % 4], expected[i % 4]
            try:
                if i % 10 == 0:
                    cpu.forget(warm.parameters())
                torch.testing.assert_close(warm(x).double(), y, **CLOSE)
            except Exception as error:  # reported in the test's own thread
                wrong.append(error)

    threads = [threading.Thread(target=call, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
