"""The CPU engine: what it keeps, that every change of a layer is seen, and whom it leaves alone."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from kronbert import KroneckerLinear, KroneckerShape, ShapeError, cpu, forms, reference
from kronbert.forms import DENSE, LOW_RANK, Form

ONE = KroneckerShape(6, 4, 5, 7, 2)  # 30 x 28
MIXED = (ONE, KroneckerShape(5, 7, 6, 4), KroneckerShape(30, 1, 1, 28, 3))
PICKS = {
    "dense": (DENSE,),
    "mix": (Form("b", "rows", "mix"),),
    "turn": (Form("a", "turn", "rows"),),
    "fold": (Form("b", "fold", "fold"),),
}
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(autouse=True)
def nothing_kept():
    cpu.forget()
    yield
    cpu.forget()


@pytest.fixture(params=PICKS)
def pick(request, monkeypatch):
    """One group's form, whatever the tables say, in chunks of 3 rows."""
    monkeypatch.setattr(forms, "CHUNK_BYTES", 1)
    monkeypatch.setattr(forms, "FEWEST_ROWS", 3)
    monkeypatch.setattr(cpu, "choose", lambda *args, **more: PICKS[request.param])
    return request.param


@pytest.fixture
def made(monkeypatch):
    """How often the matrices of a product were made: [times]."""
    made = [0]

    def counted(function):
        def count(*args):
            made[0] += 1
            return function(*args)

        return count

    monkeypatch.setattr(cpu, "prepare", counted(cpu.prepare))
    monkeypatch.setattr(cpu, "weight", counted(cpu.weight))
    return made


def new(groups=ONE, dtype=torch.float32, **more):
    return KroneckerLinear(28, 30, groups, dtype=dtype, **more)


def definition(layer, x):
    """The layer's output in float64, multiplied out from the parameters as they are."""
    a, b = ([t.detach().double() for t in layer.matrices(letter)] for letter in "ab")
    bias = None if layer.bias is None else layer.bias.detach().double()
    return reference.kron_linear(x.double(), a, b, bias)


def is_right(layer, x, y=None):
    y = layer(x) if y is None else y
    expected = definition(layer, x)
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


# What is kept.


def test_later_calls_use_what_was_kept(pick, made):
    layer, x = new(), torch.randn(5, 28)
    with torch.no_grad():
        for n in (5, 5, 7, 6):  # one bucket
            is_right(layer, torch.randn(n, 28))
            assert made == [1]
        is_right(layer, torch.randn(2, 3, 28))
        assert made == [1]
        is_right(layer, torch.randn(8, 28))
        assert made == [2]
        is_right(layer, x)
        assert made == [2]
    with torch.inference_mode():
        is_right(layer, x)
    assert made == [2]
    assert len(cpu._KEPT) == 1


def test_buckets(monkeypatch):
    """As many rows as one another up to a power of two; the form is that of a number inside."""
    asked = []

    class Table:
        def choose(self, shapes, n, *, fresh):
            asked.append(n)
            return (DENSE,)

    monkeypatch.setattr(cpu, "tables", lambda: {"float32": Table()})
    cpu._choose.cache_clear()
    try:
        members = {}
        for n in range(1, 2000):
            members.setdefault(cpu.bucket(n), []).append(n)
            cpu.choose((ONE,), torch.float32, n)
    finally:
        cpu._choose.cache_clear()
    assert len(asked) == len(members)
    for middle, numbers in zip(asked, members.values(), strict=True):
        assert middle in numbers or numbers[-1] == 1999
        assert numbers[-1] < 2 * numbers[0]
    assert cpu.bucket(0) not in members


def test_with_gradients_nothing_is_kept(pick, made):
    layer, x = new(), torch.randn(4, 28)
    for i in range(1, 4):
        is_right(layer, x)
        assert made == [i]
    assert not cpu._KEPT
    layer.requires_grad_(False)  # a frozen layer on an input without gradients
    is_right(layer, x)
    assert not cpu._KEPT


def test_groups_are_kept_together(made):
    layer, x = new(MIXED), torch.randn(4, 28)
    with torch.no_grad():
        is_right(layer, x)
        once = made[0]
        assert once >= 1
        is_right(layer, x)
        assert made[0] == once
        for parameter in layer.matrices("b"):
            parameter.mul_(1.5)
            is_right(layer, x)
    assert made[0] == 4 * once


@pytest.mark.parametrize(
    "forms_of_groups", [(DENSE,), (PICKS["mix"][0], PICKS["turn"][0], LOW_RANK)]
)
def test_every_way_to_sum_groups(forms_of_groups, monkeypatch):
    monkeypatch.setattr(cpu, "choose", lambda *args, **more: forms_of_groups)
    layer, x = new(MIXED), torch.randn(9, 28)
    is_right(layer, x)
    with torch.no_grad():
        is_right(layer, x)
        is_right(layer, x)


def test_what_is_kept_is_a_copy(pick):
    """A view of a parameter would show a change half, or keep the parameter alive."""
    layer, x = new(KroneckerShape(30, 4, 1, 7)), torch.randn(4, 28)
    with torch.no_grad():
        layer(x)
        (kept,) = cpu._KEPT.values()
        (run,) = kept.runs.values()
        layer.a.zero_()
        layer.b.zero_()
        assert run(x, layer.bias).abs().min() > 0


def test_entries_leave_with_the_layer(pick):
    layer, other, x = new(), new(), torch.randn(4, 28)
    with torch.no_grad():
        layer(x)
        other(x)
    assert len(cpu._KEPT) == 2
    del layer
    gc.collect()
    assert list(cpu._KEPT) == [id(other.a)]
    other.b = nn.Parameter(torch.randn_like(other.b))  # the old one is freed
    gc.collect()
    assert not cpu._KEPT


def test_copies_carry_nothing_kept(pick, tmp_path):
    layer, x = new(), torch.randn(4, 28)
    before = (set(layer.__dict__), pickle.dumps(layer))
    with torch.no_grad():
        layer(x)
        assert (set(layer.__dict__), pickle.dumps(layer)) == before
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        torch.save(layer, tmp_path / "layer.pt")
        twins.append(torch.load(tmp_path / "layer.pt", weights_only=False))
        assert len(cpu._KEPT) == 1
        for twin in twins:
            is_right(twin, x)
            twin.a.mul_(2)
            is_right(twin, x)
            is_right(layer, x)


# Every change is seen.


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


# Inputs, after a call that was kept.


@pytest.fixture
def warm(pick):
    """A layer that has run at 1 to 31 rows without gradients."""
    layer = new()
    with torch.no_grad():
        for n in (1, 3, 5, 9, 17):
            layer(torch.randn(n, 28))
    assert len(next(iter(cpu._KEPT.values())).runs) == 5
    return layer


@torch.no_grad()
def test_layouts(warm):
    x = torch.randn(5, 28)
    for strided in (x.T.contiguous().T, torch.randn(5, 56)[:, ::2], torch.randn(10, 28)[::2]):
        assert not strided.is_contiguous()
        is_right(warm, strided)
    y = torch.randn(2, 3, 28).transpose(0, 1)
    is_right(warm, y)
    assert warm(y).shape == (3, 2, 30)
    is_right(warm, x[0])
    assert warm(x[0]).shape == (30,)
    is_right(warm, torch.randn(1, 28).expand(6, 28))
    assert warm(nn.Parameter(x)).shape == (5, 30)


@torch.no_grad()
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)])
def test_no_rows(leading, pick):
    layer = new()
    for _ in range(2):
        assert layer(torch.randn(*leading, 28)).shape == (*leading, 30)
    assert not cpu._KEPT


@torch.no_grad()
def test_the_input_is_not_written(warm):
    x = torch.randn(5, 28)
    before, bias = x.clone(), warm.bias.clone()
    first = warm(x).clone()
    assert torch.equal(warm(x), first)
    assert torch.equal(x, before)
    assert torch.equal(warm.bias, bias)


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(7, 4), r"input \(7, 4\): expected a last dimension of a_in \* b_in = 4 \* 7"),
        (torch.randn(5, 56), r"input \(5, 56\)"),
        (torch.randn(28, 1), r"input \(28, 1\)"),
        (torch.tensor(1.0), r"input \(\)"),
        (torch.randn(5, 28).bfloat16(), r"the input is torch.bfloat16, a is torch.float32"),
        (torch.randn(5, 28).double(), r"the input is torch.float64, a is torch.float32"),
        (torch.ones(5, 28, dtype=torch.int64), r"input of torch.int64: expected a float"),
        (torch.randn(5, 28, device="meta"), r"the input is on meta, a on cpu"),
    ],
)
def test_wrong_inputs_are_refused(x, said, warm):
    with pytest.raises(ShapeError, match=said):
        warm(x)


@torch.no_grad()
def test_wrong_bias_is_refused(warm):
    x = torch.randn(5, 28)
    for bias, said in ((torch.randn(29), r"bias \(29,\)"), (torch.randn(30).double(), "bias is")):
        warm.bias = nn.Parameter(bias)
        with pytest.raises(ShapeError, match=said):
            warm(x)


@torch.no_grad()
def test_autocast(warm):
    x = torch.randn(5, 28)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            y = warm(x)
            assert y.dtype == torch.bfloat16
            scale = definition(warm, x).abs().max()
            assert (y.double() - definition(warm, x)).abs().max() < 0.02 * scale
    assert warm(x).dtype == torch.float32
    is_right(warm, x)


@torch.no_grad()
def test_autocast_pays_for_fresh_matrices(monkeypatch):
    """The casts are new tensors in every call: nothing made of them is ever used again."""
    asked = []

    def choose(*args, fresh):
        asked.append(fresh)
        return (DENSE,)

    monkeypatch.setattr(cpu, "choose", choose)
    layer, x = new(), torch.randn(5, 28)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        layer(x)
    assert asked == [True, True]
    assert not cpu._KEPT


def test_other_dtypes_and_tensors_are_left_alone():
    a, b = torch.randn(2, 6, 4), torch.randn(2, 5, 7)

    class Own(torch.Tensor):
        pass

    x = torch.randn(3, 28)
    assert cpu.takes(x, [(a, b)])
    assert cpu.takes(x.bfloat16(), [(a, b)])
    assert not cpu.takes(x.half(), [(a, b)])
    assert not cpu.takes(x.double(), [(a, b)])
    assert not cpu.takes(x.to("meta"), [(a, b)])
    assert not cpu.takes(x.as_subclass(Own), [(a, b)])
    assert not cpu.takes(x, [(a, b.as_subclass(Own))])
    assert cpu.in_place(x) is False
    with torch.no_grad():
        assert cpu.in_place(x) is True


@torch.no_grad()
def test_subclasses_take_the_plain_path(warm, monkeypatch):
    class Own(torch.Tensor):
        pass

    x = torch.randn(5, 28)
    monkeypatch.setattr(cpu.Kept, "holds", lambda *args: pytest.fail("asked what is kept"))
    y = warm(x.as_subclass(Own))
    assert type(y) is Own
    is_right(warm, x, y.as_subclass(torch.Tensor))


# Transformations and graphs take the plain path: nothing kept becomes a constant of theirs.


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
