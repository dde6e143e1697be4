"""`KroneckerLMHead`: logits of the tied table, through every copy of the two."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, disk_offload  # type: ignore[import-untyped]
from torch import nn

from kronbert import KroneckerEmbedding, KroneckerLMHead, KroneckerShape
from kronbert.errors import KronbertError

GROUPS = (KroneckerShape(30, 4, 1, 3, 2), KroneckerShape(30, 1, 1, 12, 2))


class Tied(nn.Module):
    """The smallest masked LM."""

    def __init__(self):
        super().__init__()
        self.embedding = KroneckerEmbedding(30, 12, GROUPS)
        self.head = KroneckerLMHead(self.embedding, nn.Parameter(torch.randn(30)))

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_logits_are_those_of_the_table():
    model = Tied().double()
    h = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = h @ model.embedding.weight.T + model.head.bias
    torch.testing.assert_close(model.head(h), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(model.head.weight, model.embedding.weight)
    assert "12, 30, tied to 2·30x4⊗1x3 + svd(2) 30x12, bias=True" in repr(model.head)


def test_gradients_reach_the_table():
    model = Tied().double()
    h = torch.randn(5, 12, dtype=torch.float64)
    parameters = [*model.embedding.parameters(), model.head.bias]
    found = torch.autograd.grad(model.head(h).square().sum(), parameters)
    dense = h @ model.embedding.weight.T + model.head.bias
    expected = torch.autograd.grad(dense.square().sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_owns_only_its_bias():
    model = Tied()
    assert [name for name, _ in model.head.named_parameters()] == ["bias"]
    assert sorted(model.state_dict()) == sorted(
        [*(f"embedding.{name}" for name in ("a", "b", "a_1", "b_1")), "head.bias"]
    )
    assert list(KroneckerLMHead(model.embedding).parameters()) == []


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cast": lambda model: copy.deepcopy(model).double(),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_step_on_the_embedding_moves_the_head(make):
    first = Tied()
    model = make(first)
    assert model.head.table is model.embedding
    h = torch.randn(3, 12).to(model.embedding.a.dtype)
    before = model.head(h)
    original = first.embedding.a.detach().clone()
    optimizer = torch.optim.SGD(model.embedding.parameters(), 0.1)
    model(torch.tensor([1, 2])).logsumexp(-1).sum().backward()
    optimizer.step()
    assert not torch.equal(model.head(h), before)
    torch.testing.assert_close(model.head(h), h @ model.embedding.weight.T + model.head.bias)
    assert model is first or torch.equal(first.embedding.a, original)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_table_that_accelerate_offloads_is_loaded(where, tmp_path):
    model, ids = Tied().eval(), torch.tensor([1, 2])
    with torch.no_grad():
        expected = model(ids)
        if where == "memory":
            cpu_offload(model, execution_device="cpu")
        else:
            disk_offload(model, tmp_path, execution_device="cpu")
        for _ in range(2):
            assert model.embedding.a.is_meta
            torch.testing.assert_close(model(ids), expected)


def test_dense_twin_is_tied_to_the_dense_table():
    model = Tied().eval()
    table = model.embedding.to_embedding()
    head = model.head.to_linear(table)
    assert head.weight is table.weight
    h = torch.randn(3, 12)
    torch.testing.assert_close(head(h), model.head(h))
    assert head.bias is not model.head.bias
    assert not head.training


def test_tying_a_dense_weight_to_it_is_refused():
    with pytest.raises(AttributeError, match="its table is the tied KroneckerEmbedding"):
        Tied().head.weight = nn.Parameter(torch.zeros(30, 12))


def test_replicas_of_data_parallel_are_refused():
    """They would read the first device's matrices: what replicates a module calls this of each."""
    with pytest.raises(KronbertError, match=r"replicas of a KroneckerLMHead .*torchrun"):
        [module._replicate_for_data_parallel() for module in Tied().modules()]
