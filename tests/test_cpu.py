"""The CPU engine: what it keeps of a layer, how often it is made, and when it leaves."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from kronbert import KroneckerShape, cpu
from kronbert.forms import DENSE, LOW_RANK
from tests.kept_layers import MIXED, ONE, PICKS, is_right, new

pytestmark = pytest.mark.usefixtures("nothing_kept")


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


def test_later_calls_use_what_was_kept(pick, made):
    layer, x = new(), torch.randn(5, 28)
    with torch.no_grad():
        for n in (5, 5, 7, 6):  # one bucket
            is_right(layer, torch.randn(n, 28))
            assert made == [1]
        is_right(layer, torch.randn(2, 3, 28))
        assert made == [1]
        is_right(layer, torch.randn(8, 28))  # another, of the same form
        assert len(next(iter(cpu._KEPT.values())).runs) == 2
        is_right(layer, x)
    with torch.inference_mode():
        is_right(layer, x)
    assert made == [1]
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


def test_numbers_of_rows_share_their_matrices(pick):
    """A server with texts of all lengths holds one copy of each, not one for every length."""
    layer = new()
    with torch.no_grad():
        for n in (1, 2, 3, 4, 6, 9, 17, 40, 100):
            is_right(layer, torch.randn(n, 28))
    (kept,) = cpu._KEPT.values()
    assert len(kept.runs) == 9
    assert len({id(run) for run in kept.runs.values()}) == 1
