"""Operands for the kernels' tests, on the device there is."""

import torch

from kronbert.shapes import KroneckerShape

DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies bfloat16 wrongly
EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*size, dtype=torch.float32, scale=1.0):
    return (torch.randn(*size) * scale).to(DEVICE, dtype)


def matrices(text, dtype):
    """a and b of a shape, scaled so that outputs keep the inputs' scale."""
    shape = KroneckerShape.parse(text)
    scale = (shape.rank * shape.a_in * shape.b_in) ** -0.25
    a = normal(shape.rank, shape.a_out, shape.a_in, dtype=dtype, scale=scale)
    return a, normal(shape.rank, shape.b_out, shape.b_in, dtype=dtype, scale=scale)


def affine(width, dtype):
    """A LayerNorm's weight and bias, none of them near the usual ones and zeros."""
    return normal(width, dtype=dtype, scale=0.2) + 1.5, normal(width, dtype=dtype)


def seed(number=7):
    return torch.tensor([number], device=DEVICE)


def rms(error):
    return error.double().pow(2).mean().sqrt().item() if error.numel() else 0.0


def leaves(tensors):
    return [t.detach().requires_grad_() for t in tensors]
