"""Small layers, norms and a half for the blocks of the CPU, and what they are in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kronbert import KroneckerLinear, KroneckerShape, blocks, native
from kronbert.blocks import Linear, Norm

KERNELS = native.library() is not None
needs_kernels = pytest.mark.skipif(
    not KERNELS, reason="no row kernels here: off Linux, no C compiler, or turned off"
)
BACK = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def layer(shape, dtype=torch.float32, *, bias=True):
    shape = KroneckerShape.parse(shape)
    made = KroneckerLinear(shape.in_features, shape.out_features, shape, bias=bias, dtype=dtype)
    if bias:
        nn.init.normal_(made.bias)
    return made


def of(module):
    """The module as blocks take it."""
    return Linear(module.matrices("a"), module.matrices("b"), module.bias)


def norm_of(module):
    return Norm(module.weight, module.bias, module.eps)


def exact(module, x):
    bias = None if module.bias is None else module.bias.detach().double()
    return F.linear(x.double(), module.weight.detach().double(), bias)


def exact_norm(norm, x):
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    return F.layer_norm(x.double(), norm.normalized_shape, weight, bias, norm.eps)


def assert_near(found, expected):
    limit = BACK[found.dtype] * (1 + expected.abs().max())
    assert (found.double() - expected).abs().max() <= limit


def a_norm(width, dtype=torch.float32):
    norm = nn.LayerNorm(width, dtype=dtype)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    return norm


class Half:
    """Both maps of a feed-forward half and its norm: 48 wide, 192 inside in slices of 32."""

    def __init__(self, dtype=torch.float32, **more):
        self.expand = layer("6x3*32x16", dtype, **more)
        self.contract = layer("3x6*16x32", dtype, **more)
        self.norm = a_norm(48, dtype)

    def ours(self, x):
        return blocks.ffn_norm(x, of(self.expand), of(self.contract), norm_of(self.norm))

    def exact(self, x):
        hidden = F.gelu(exact(self.expand, x))
        return exact_norm(self.norm, x.double() + exact(self.contract, hidden))
