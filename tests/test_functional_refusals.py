"""The plain path refuses sizes, dtypes and ids that do not fit."""

import re

import pytest
import torch

from kronbert import functional
from kronbert.errors import ShapeError
from tests.random_terms import terms


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x, a, b: functional.kron_linear(x[:, :-1], a, b),
            "kron_linear: input (4, 95): expected a last dimension of a_in * b_in = 6 * 16 = 96. "
            "Check which layer it comes from.",
        ),
        (lambda x, a, b: functional.kron_linear(x[0, 0], a, b), "kron_linear: input ()"),
        (
            lambda x, a, b: functional.kron_linear(x.long(), a, b),
            "kron_linear: input of torch.int64: expected a float",
        ),
        (
            lambda x, a, b: functional.kron_linear(x.half(), a, b),
            "kron_linear: the input is torch.float16, a is torch.float32. Cast one of them: "
            "input.to(torch.float32) or module.to(torch.float16)",
        ),
        (
            lambda x, a, b: functional.kron_linear(x, a, b.double()),
            "the input is torch.float32, b is torch.float64",
        ),
        (
            lambda x, a, b: functional.kron_linear(x, a, b, torch.zeros(48).double()),
            "the input is torch.float32, bias is torch.float64",
        ),
        (
            lambda x, a, b: functional.kron_linear(x, a, b, torch.zeros(1)),
            "kron_linear: bias (1,): expected (48,), one number per output",
        ),
        (
            lambda x, a, b: functional.kron_linear(x, [a], [b, b]),
            "expected a and b as two tensors, or as two sequences of as many groups",
        ),
        (lambda x, a, b: functional.kron_linear(x, [a], b), "two sequences of as many groups"),
        (lambda x, a, b: functional.kron_linear(x, [], []), "two sequences of as many groups"),
        (
            lambda x, a, b: functional.kron_linear(x, a, b.repeat(2, 1, 1)),
            "expected a (rank, a_out, a_in) and b (rank, b_out, b_in) with the same rank",
        ),
        (lambda x, a, b: functional.kron_linear(x, a[0], b[0]), "One term needs rank 1: unsqueeze"),
        (
            lambda x, a, b: functional.kron_linear(x, [a, a[:, :-1]], [b, b]),
            "the groups make weights of 48x96 and 46x96: expected one size",
        ),
        (
            lambda x, a, b: functional.kron_linear(x.to("meta"), a, b),
            "the input is on meta, a on cpu. Move one of them",
        ),
        (
            lambda x, a, b: functional.kron_logits(x[:, 1:], a.transpose(0, 1), b),
            "kron_logits: input (4, 95): expected a last dimension",
        ),
        (
            lambda x, a, b: functional.kron_logits(x, a, b),
            "kron_logits: a (1, 24, 6), b (1, 2, 16): expected a (a_out, rank, a_in)",
        ),
        (
            lambda x, a, b: functional.kron_embedding(x, a.transpose(0, 1), b),
            "kron_embedding: ids of torch.float32: expected integers. Call ids.long()",
        ),
        (
            lambda x, a, b: functional.kron_embedding(x > 0, a.transpose(0, 1), b),
            "kron_embedding: ids of torch.bool: expected integers",
        ),
    ],
)
def test_what_does_not_fit(call, text):
    a, b = terms("24x6*2x16", torch.float32)
    with pytest.raises(ShapeError, match=re.escape(text)):
        call(torch.randn(4, 96), a, b)


@pytest.mark.parametrize("spec", ["6x2*1x3", "3x2*2x3"])
@pytest.mark.parametrize("wrong", [6, -1])
def test_an_id_outside_the_table(spec, wrong):
    a, b = terms(spec)
    with pytest.raises(IndexError):
        functional.kron_embedding(torch.tensor([0, wrong]), a.transpose(0, 1), b)
