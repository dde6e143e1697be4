"""Random Kronecker matrices of a shape."""

import torch

from kronbert.shapes import KroneckerShape


def terms(spec, dtype=torch.float64, scale=1.0):
    shape = KroneckerShape.parse(spec) if isinstance(spec, str) else spec
    a = scale * torch.randn(shape.rank, shape.a_out, shape.a_in, dtype=torch.float64)
    b = torch.randn(shape.rank, shape.b_out, shape.b_in, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)
