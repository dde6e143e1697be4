"""A Kronecker layer for the CPU engine, the forms it may take, and what it must give."""

import torch

from kronbert import KroneckerLinear, KroneckerShape, reference
from kronbert.forms import DENSE, Form

ONE = KroneckerShape(6, 4, 5, 7, 2)  # 30 x 28
MIXED = (ONE, KroneckerShape(5, 7, 6, 4), KroneckerShape(30, 1, 1, 28, 3))
PICKS = {
    "dense": (DENSE,),
    "mix": (Form("b", "rows", "mix"),),
    "turn": (Form("a", "turn", "rows"),),
    "fold": (Form("b", "fold", "fold"),),
}
CLOSE = {"rtol": 0, "atol": 2e-5}


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
