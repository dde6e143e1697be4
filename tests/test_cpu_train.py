"""The feed-forward half with gradients on a CPU: the plain numbers, whatever the rows at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kronbert
from kronbert import blocks, cpu_train, functional
from kronbert.blocks import Linear
from kronbert.errors import KronbertError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's forms")

IN, WIDE, OUT, UP, DOWN = 192, 768, 160, 5, 7


def a_map(rank, out, inner, bias=True):
    a, b = torch.randn(rank, out, 1) / rank**0.5, torch.randn(rank, 1, inner) / inner**0.5
    made = [a, b, *([torch.randn(out)] if bias else [])]
    for tensor in made:
        tensor.requires_grad_(True)
    return Linear([a], [b], made[2] if bias else None)


def plain(x, expand, contract):
    return functional.kron_linear(F.gelu(functional.kron_linear(x, *expand)), *contract)


def gradients(call, x, *maps):
    x = x.clone().requires_grad_(True)
    tensors = [x, *(t for m in maps for t in (*m.a, *m.b, m.bias) if t is not None)]
    y = call(x, *maps)
    return y, torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[-1])).sum(), tensors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, IN), (1, IN), (11, IN), (0, IN)])
def test_the_numbers_are_the_plain_ones(monkeypatch, shape, bias):
    monkeypatch.setattr(cpu_train, "ROWS", 4)
    torch.manual_seed(0)
    maps = a_map(UP, WIDE, IN, bias), a_map(DOWN, OUT, WIDE, bias)
    x = torch.randn(shape)
    assert cpu_train.ffn(x, *maps) is not None
    (y, found), (expected, own) = (gradients(call, x, *maps) for call in (blocks.ffn, plain))
    torch.testing.assert_close(y, expected)
    for got, want in zip(found, own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_checkpointed_half_has_the_same_gradients():
    """What a layer saved can be read once there."""
    torch.manual_seed(0)
    maps = a_map(UP, WIDE, IN), a_map(DOWN, OUT, WIDE)
    x = torch.randn(11, IN)
    assert cpu_train.ffn(x, *maps) is not None

    def repeated(x, *maps):
        return checkpoint(blocks.ffn, x, *maps, use_reentrant=False)

    (y, found), (expected, own) = (gradients(call, x, *maps) for call in (repeated, blocks.ffn))
    assert torch.equal(y, expected)
    for got, want in zip(found, own, strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_a_planned_student_trains_with_gradient_checkpointing(monkeypatch):
    student = kronbert.fuse(kronbert.load("kronbert/minilm-x19")).train()
    ids, middle, halves = torch.randint(1000, 3000, (8, 32)), cpu_train.middle, []
    monkeypatch.setattr(cpu_train, "middle", lambda *given: halves.append(1) or middle(*given))

    def gradients():
        torch.manual_seed(0)  # of dropout
        student.zero_grad()
        student(input_ids=ids).last_hidden_state.square().mean().backward()
        return {
            name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None
        }

    expected = gradients()
    assert len(halves) == 6
    student.gradient_checkpointing_enable()
    found = gradients()
    assert len(halves) == 6 + 12
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_the_derivatives_are_the_functions(monkeypatch):
    monkeypatch.setattr(cpu_train, "ROWS", 3)
    torch.manual_seed(0)
    sizes = ((8, 2), (2, 6), (6,), (3, 6))
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(cpu_train.middle, given)
    assert torch.autograd.gradcheck(lambda z, up, d: cpu_train.middle(z, up, None, d),
                                    (given[0], given[1], given[3]))  # fmt: skip


def test_the_hidden_layer_is_never_whole():
    """What is kept for the backward pass: nothing is as wide as rows times hidden."""
    maps = a_map(UP, WIDE, IN), a_map(DOWN, OUT, WIDE)
    x, seen = torch.randn(600, IN), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(t.numel()) or t, lambda t: t
    ):
        blocks.ffn(x, *maps)
    assert 600 * IN in seen
    assert max(seen) < 600 * WIDE


def test_a_second_derivative_is_refused():
    """By every input, and by one of them alone, where torch's own refusal is passed by."""
    x = torch.randn(5, IN, requires_grad=True)
    y = blocks.ffn(x, a_map(UP, WIDE, IN), a_map(DOWN, OUT, WIDE))
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(KronbertError, match=r"no second derivative.*kronbert.unfuse\(model\)"):
        torch.autograd.grad(first.sum(), x, retain_graph=True)
    with pytest.raises(KronbertError, match="no second derivative"):
        first.sum().backward()


def test_what_it_leaves_to_others():
    torch.manual_seed(0)
    x, expand, contract = torch.randn(64, IN), a_map(UP, WIDE, IN), a_map(DOWN, OUT, WIDE)
    assert cpu_train.ffn(x, expand, contract) is not None
    assert cpu_train.ffn(x.bfloat16(), expand, contract) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_train.ffn(x, expand, contract) is None
    two = Linear([*expand.a, *expand.a], [*expand.b, *expand.b], expand.bias)
    assert cpu_train.ffn(x, two, contract) is None
    product = Linear([torch.randn(1, 48, 12)], [torch.randn(1, 16, 16)], None)
    assert cpu_train.ffn(x, product, contract) is None
    assert cpu_train.ffn(x, a_map(190, WIDE, IN), contract) is None  # dense costs less
    assert cpu_train.ffn(x, expand, a_map(DOWN, OUT, WIDE + 1)) is None


def test_many_gradients_at_once_are_refused():
    x = torch.randn(5, IN, requires_grad=True)
    y = blocks.ffn(x, a_map(UP, WIDE, IN), a_map(DOWN, OUT, WIDE))
    given = torch.eye(5, OUT)[:, None].expand(5, 5, OUT)
    with pytest.raises(KronbertError, match=r"one gradient at a time.*kronbert.unfuse\(model\)"):
        torch.autograd.grad(y, x, given, is_grads_batched=True)
