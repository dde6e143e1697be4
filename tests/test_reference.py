"""The definitions themselves, against `torch.kron` and tensorly's Kronecker product."""

import pytest
import tensorly
import torch
from tensorly.tenalg import kronecker

from kronbert import reference


def random(*size):
    return torch.randn(*size, dtype=torch.float64)


def test_weight_is_the_sum_of_kronecker_products():
    a, b = random(3, 5, 4), random(3, 2, 7)
    expected = sum(torch.kron(one_a, one_b) for one_a, one_b in zip(a, b, strict=True))
    torch.testing.assert_close(reference.kron_weight(a, b), expected)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        by_tensorly = sum(kronecker([one_a, one_b]) for one_a, one_b in zip(a, b, strict=True))
    torch.testing.assert_close(reference.kron_weight(a, b), by_tensorly)


def test_groups_are_summed():
    a, b = [random(3, 5, 4), random(2, 10, 1)], [random(3, 2, 7), random(2, 1, 28)]
    parts = [reference.kron_weight(*pair) for pair in zip(a, b, strict=True)]
    torch.testing.assert_close(reference.kron_weight(a, b), parts[0] + parts[1])


def test_linear_is_row_major():
    """Y (a_out, b_out) = a · X (a_in, b_in) · bᵀ, as ARCHITECTURE writes it."""
    a, b, x, bias = random(1, 5, 4), random(1, 2, 7), random(28), random(10)
    expected = (a[0] @ x.view(4, 7) @ b[0].T).flatten() + bias
    torch.testing.assert_close(reference.kron_linear(x, a, b, bias), expected)


def test_embedding_and_logits():
    a, b, bias = random(2, 5, 4), random(2, 3, 7), random(15)
    ids = torch.tensor([[0, 14], [7, 7]])
    table = reference.kron_weight(a, b)
    torch.testing.assert_close(reference.kron_embedding(ids, a, b), table[ids])
    h = random(6, 28)
    torch.testing.assert_close(reference.kron_logits(h, a, b, bias), h @ table.T + bias)


def test_groups_must_pair_up():
    with pytest.raises(ValueError, match="zip"):
        reference.kron_weight([random(1, 2, 3)], [random(1, 2, 3), random(1, 2, 3)])
