"""What is kept of fused blocks on the CPU follows every change, and leaves with the layers."""

import pytest
import torch
from torch import nn

from kronbert import blocks, cpu, cpu_blocks, native
from tests.small_blocks import (
    BACK,
    Half,
    a_norm,
    assert_near,
    exact_norm,
    layer,
    needs_kernels,
    norm_of,
)

pytestmark = pytest.mark.usefixtures("nothing_kept")

CHANGES = {
    "optimizer": None,
    "in place": lambda half: half.expand.b.mul_(1.5),
    "part of the second": lambda half: half.contract.a[0, 1].add_(1),
    "bias": lambda half: half.expand.bias.add_(1),
    "data": lambda half: setattr(half.contract.b, "data", torch.randn_like(half.contract.b)),
    "state dict": lambda half: half.expand.load_state_dict(layer("6x3*32x16").state_dict()),
    "assigned": lambda half: half.contract.load_state_dict(
        layer("3x6*16x32").state_dict(), assign=True
    ),
    "replaced": lambda half: setattr(half.expand, "a", nn.Parameter(torch.randn(1, 6, 3))),
    "there and back": None,
    "behind torch's back, then eval": None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, kernels, ran):
    half, x = Half(), torch.randn(9, 48)
    with torch.no_grad():
        before = half.ours(x)
    for _ in range(2):
        if change == "optimizer":
            half.ours(x).square().sum().backward()
            parameters = [*half.expand.parameters(), *half.contract.parameters()]
            torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
        else:
            with torch.no_grad():
                if change == "there and back":
                    half.expand.b.mul_(1.5)
                    half.expand.double().float()
                elif change.startswith("behind"):
                    half.expand.b.data.mul_(3)
                    half.expand.eval()
                else:
                    CHANGES[change](half)
        with torch.no_grad():
            assert_near(half.ours(x), half.exact(x))
            assert_near(half.ours(x), half.exact(x))
    with torch.no_grad():
        assert not torch.allclose(half.ours(x), before, atol=1e-2)
    assert bool(ran["ffn_middle"]) == kernels


@torch.no_grad()
def test_to_another_dtype_and_back(kernels):
    half, x = Half(), torch.randn(9, 48)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        for module in (half.expand, half.contract, half.norm):
            module.to(dtype)
        found = half.ours(x.to(dtype))
        assert found.dtype == dtype
        expected = half.exact(x.to(dtype))
        assert (found.double() - expected).abs().max() <= BACK.get(dtype, 1e-10) * 10


@needs_kernels
@torch.no_grad()
def test_what_is_kept_leaves_with_the_layer():
    half, x = Half(), torch.randn(9, 48)
    half.ours(x)
    assert len(cpu._KEPT) == 1
    del half
    assert not cpu._KEPT


@needs_kernels
def test_a_row_too_wide_for_a_thread_s_stack_goes_the_plain_way(ran):
    for width, calls in ((cpu_blocks.WIDEST, 1), (cpu_blocks.WIDEST + native.LANES, 1)):
        norm, x = a_norm(width), torch.randn(2, width)
        with torch.no_grad():
            assert_near(blocks.residual_norm(x, None, norm_of(norm)), exact_norm(norm, x))
        assert ran["add_norm"] == calls
