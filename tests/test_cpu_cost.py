"""The CPU's cost model: what a form is charged for, and the choice."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig

from kronbert import cpu_cost, forms, native
from kronbert.config import KroneckerConfig
from kronbert.cpu_cost import CostTable, Primitive, prepared_numbers, shipped_tables
from kronbert.forms import DENSE, GATHERED, LOW_RANK, forms_of
from kronbert.inventory import inventory
from kronbert.planning import make_plan
from kronbert.presets import PRESETS
from kronbert.search import predicted_loss, shapes_of
from kronbert.shapes import KroneckerShape, low_rank

SPECS = ["5x4*2x7", "3:5x4*2x7", "4:2x3*11x6", "2:16x9*3x2", "6x5*1x4", "2:3x1*4x5"]
SPECS += ["15x1*1x14", "4:15x1*1x14"]
SHAPES = [KroneckerShape.parse(spec) for spec in SPECS]
CASES = [pytest.param(s, f, id=f"{s} {f}") for s in SHAPES for f in forms_of(s)]
KERNEL_SHAPE = KroneckerShape(32, 16, 4, 2, 3)
ALL_CASES = [*CASES, *(pytest.param(KERNEL_SHAPE, f, id=f"{KERNEL_SHAPE} {f}") for f in GATHERED)]
ROWS = (1, 2, 3, 7, 96, 192, 3000, 100_000)


def per_unit(us, dims):
    """A primitive whose time is ``us`` times the product of its sizes."""
    return Primitive(((1,),) * dims, (us,))


def table(gemm=1e-3, mix=1e9, turn=1e9, add=1e-9):
    """Times in proportion to the work: a product of m, n, k takes gemm * m * n * k us."""
    dims = {"gemm": (gemm, 3), "mix": (mix, 4), "turn": (turn, 3), "add": (add, 1)}
    return CostTable(4, **{name: per_unit(*of) for name, of in dims.items()})


# What a form is charged for.


@pytest.mark.parametrize(("shape", "form"), ALL_CASES)
def test_prepared_numbers_are_those_of_prepare(shape, form):
    a = torch.randn(shape.rank, shape.a_out, shape.a_in)
    b = torch.randn(shape.rank, shape.b_out, shape.b_in)
    made = sum(matrix.numel() for matrix in forms.prepare(form, a, b))
    assert prepared_numbers(form, shape) == made


class Sizes(TorchDispatchMode):
    """Records the primitives that run, as the cost model names them; turns by their elements."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            x, w = args[-2:]
            self.seen.append(("gemm", x.shape[0], w.shape[1], w.shape[0]))
        elif name == "bmm":
            small, slices = args
            self.seen.append(("mix", *small.shape, slices.shape[2]))
        elif name == "clone":
            self.seen.append(("turn", made.numel()))
        return made


PRICES = {"gemm": 1, "mix": 100, "turn": 10_000, "add": 0}  # told apart in a sum


class Asked:
    """A primitive that costs one price and records the sizes it is asked for."""

    def __init__(self, name, asked):
        self.name, self.asked = name, asked

    def us(self, *sizes):
        self.asked.append((self.name, *(sizes[:1] if self.name == "turn" else sizes)))
        return PRICES[self.name]


@pytest.mark.parametrize(("shape", "form"), CASES)
def test_a_form_is_charged_for_what_it_runs(shape, form):
    if 1 in (shape.a_out, shape.a_in, shape.b_out, shape.b_in) and "turn" in form:
        pytest.skip("turning a side of 1 copies nothing")
    n = 7
    a = torch.randn(shape.rank, shape.a_out, shape.a_in)
    b = torch.randn(shape.rank, shape.b_out, shape.b_in)
    x, matrices = torch.randn(n, shape.in_features), forms.prepare(form, a, b)
    with Sizes() as ran:
        forms.run(form, shape, x, matrices)
    asked = []
    priced = CostTable(4, *(Asked(name, asked) for name in cpu_cost.PRIMITIVES))
    us = priced.form_us(form, shape, n)
    assert us == sum(PRICES[name] for name, *_ in ran.seen)
    assert not Counter(ran.seen) - Counter(asked), "runs at sizes that it was not asked about"
    assert [item for item in asked if item[0] == "add"] == [("add", n * shape.out_features)]


def test_chunks_are_charged_one_by_one(monkeypatch):
    monkeypatch.setattr(forms, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(forms, "FEWEST_ROWS", 1)
    shape, costs = KroneckerShape(5, 4, 2, 7, 3), shipped_tables()["float32"]
    for form in forms_of(shape):
        step = forms.chunk_rows(form, shape, 4)
        if step < 1000:
            whole, rest = (costs.form_us(form, shape, n) for n in (step, 2))
            assert costs.form_us(form, shape, 3 * step) == pytest.approx(3 * whole)
            assert costs.form_us(form, shape, 3 * step + 2) == pytest.approx(3 * whole + rest)
    assert {forms.chunk_rows(form, shape, 4) < 1000 for form in forms_of(shape)} == {True, False}


@pytest.mark.parametrize("dtype", cpu_cost.DTYPES)
def test_times_are_positive(dtype):
    costs = shipped_tables()[dtype]
    for shape, n in itertools.product(SHAPES, ROWS):
        for form in forms_of(shape):
            assert 0 < costs.form_us(form, shape, n) < math.inf


# The choice. A product in proportion to its work: 100 x 100 at rank r costs 2 r / 100 of dense.


@pytest.mark.parametrize(("rank", "form"), [(1, LOW_RANK), (41, LOW_RANK), (42, DENSE)])
def test_a_form_must_be_faster_by_the_margin(rank, form):
    assert cpu_cost.MARGIN == 1.2
    assert table().choose((low_rank(100, 100, rank),), 1000) == (form,)


def test_the_fastest_form_is_taken():
    shape = KroneckerShape(20, 10, 2, 10)
    costs = shipped_tables()["float32"]
    for mix, turn, expected in ((1e-6, 1e9, "mix"), (1e9, 1e-6, "turn")):
        (pick,) = table(mix=mix, turn=turn).choose((shape,), 1000)
        assert expected in pick
    for n in ROWS:
        (pick,) = costs.choose((KroneckerShape(384, 48, 2, 16),), n)
        if pick != DENSE:
            us = [
                costs.form_us(form, KroneckerShape(384, 48, 2, 16), n)
                for form in forms_of(KroneckerShape(384, 48, 2, 16))
                if prepared_numbers(form, KroneckerShape(384, 48, 2, 16)) <= 768 * 768
            ]
            assert costs.form_us(pick, KroneckerShape(384, 48, 2, 16), n) == min(us)


def test_few_rows_of_a_narrow_layer_are_dense():
    shape = low_rank(100, 100, 1)
    assert table(gemm=1e-6).choose((shape,), 1) == (DENSE,)  # the stages cost more than it saves
    assert table(gemm=1e-6).choose((shape,), 10_000) == (LOW_RANK,)


def test_kept_matrices_may_not_outgrow_the_dense_weight(monkeypatch):
    # Products whose time grows with the cube of the inner size: four small ones would win.
    grid = ((10**9,), (10**9,), (10, 1000))
    costs = CostTable(
        4, Primitive(grid, (1.0, 1e6)), per_unit(1e-6, 4), per_unit(1e-6, 3), per_unit(1e-9, 1)
    )
    within, beyond = KroneckerShape(1, 4, 1, 100, 3), KroneckerShape(1, 4, 1, 100, 4)
    assert prepared_numbers(DENSE, beyond) == 400
    assert all(prepared_numbers(form, beyond) > 400 for form in forms_of(beyond)[1:])
    assert costs.choose((within,), 100) != (DENSE,)
    assert costs.choose((beyond,), 100) == (DENSE,)
    assert costs.choose((within, beyond), 100) == (DENSE,)
    monkeypatch.setattr(cpu_cost, "GROWTH", 2.0)
    assert costs.choose((beyond,), 100) != (DENSE,)


def test_groups_are_weighed_together():
    def groups(*ranks):
        return tuple(low_rank(100, 100, rank) for rank in ranks)

    assert table().choose(groups(20, 20), 1000) == (LOW_RANK, LOW_RANK)
    assert table().choose(groups(20, 22), 1000) == (DENSE,)
    # Adding the second product to the first, 1000 x 100 numbers, costs as much as rank 5.
    slow_add = table(add=1e-2)
    assert slow_add.choose(groups(35), 1000) == (LOW_RANK,)
    assert slow_add.choose(groups(18, 17), 1000) == (LOW_RANK, LOW_RANK)
    assert slow_add.choose(groups(19, 18), 1000) == (DENSE,)


def test_fresh_matrices_are_paid_for():
    """In training a weight is multiplied out, and its gradient taken apart, at every product."""
    shape = KroneckerShape(10, 10, 10, 10)
    slow_mix = table(mix=9e-3)
    assert slow_mix.choose((shape,), 100) == (DENSE,)
    assert slow_mix.choose((shape,), 100, fresh=True) == (DENSE,)  # 3 products pay for it
    assert slow_mix.choose((shape,), 1) == (DENSE,)
    (pick,) = slow_mix.choose((shape,), 1, fresh=True)
    assert pick != DENSE


def test_sums_in_training_pay_for_every_weight_and_every_addition():
    def groups(*ranks):
        return tuple(low_rank(100, 100, rank) for rank in ranks)

    # At one row two weights are multiplied out for 22 us, as long as rank 36 takes.
    assert table().choose(groups(20, 20), 1, fresh=True) == (LOW_RANK, LOW_RANK)
    # An addition costs three times as much as in a forward pass: as rank 5 of three products.
    slow_add = table(add=1e-2)
    assert slow_add.choose(groups(18, 18), 1000, fresh=True) == (LOW_RANK, LOW_RANK)
    assert slow_add.choose(groups(19, 18), 1000, fresh=True) == (DENSE,)


def test_multiplying_a_weight_out_takes_longer_where_short_runs_are_moved():
    for spec, ns in (("384x384*2x2", 5), ("384x48*2x16", 1.5), ("2x2*384x384", 1.02)):
        shape = KroneckerShape.parse(spec)
        us = 1e-3 * ns * shape.out_features * shape.in_features
        assert cpu_cost._rebuilt_us(shape) == pytest.approx(us, rel=1e-2)


def test_nothing_is_folded_in_training():
    only_products = table(mix=1e3, turn=1e3)
    shape = KroneckerShape(50, 2, 2, 50)
    (pick,) = only_products.choose((shape,), 1000)
    assert "fold" in pick
    assert only_products.choose((shape,), 1000, fresh=True) == (DENSE,)


@pytest.mark.parametrize(("n", "expected"), [(15, LOW_RANK), (16, DENSE)])
def test_matrices_are_read_from_memory(n, expected, monkeypatch):
    """In a model none lies in cache: from 16 rows on, each byte is charged for."""
    shape = low_rank(100, 100, 60)  # 12,000 numbers for 10,000
    monkeypatch.setattr(cpu_cost, "GROWTH", 2.0)
    monkeypatch.setattr(cpu_cost, "MARGIN", 1.0)
    monkeypatch.setattr(cpu_cost, "COLD_US_PER_BYTE", 1e-3)  # 8 us more than dense
    times = {DENSE: 100.0, LOW_RANK: 93.0 - 2 * cpu_cost.STAGE_US}
    monkeypatch.setattr(CostTable, "form_us", lambda self, form, shape, n: times[form])
    costs = table()
    assert costs.choose((shape,), n) == (expected,)
    times[LOW_RANK] -= 2  # 9 us faster
    assert costs.choose((shape,), n) == (LOW_RANK,)


GATHERS = KroneckerShape(32, 32, 4, 4)


@pytest.mark.parametrize("form", GATHERED)
def test_a_gather_is_charged_as_a_turn(form):
    n, s, asked = 7, KroneckerShape(32, 48, 4, 2, 3), []
    priced = CostTable(4, *(Asked(name, asked) for name in cpu_cost.PRIMITIVES))
    us = priced.form_us(form, s, n)
    products = {GATHERED[0]: (n * 4, 32, 48 * 3), GATHERED[1]: (n, 128, 48 * 3 * 4)}
    turns = [n * max(s.in_features, s.a_in * s.rank * s.b_out)]
    turns += [n * s.out_features] * (form == GATHERED[0])
    assert [item[1:] for item in asked if item[0] == "gemm"] == [products[form]]
    assert sorted(item[1] for item in asked if item[0] == "turn") == sorted(turns)
    assert us == PRICES["gemm"] + len(turns) * PRICES["turn"]


def test_gathering_needs_the_kernels_and_no_gradients(monkeypatch):
    def form_us(self, form, shape, n):
        return 100.0 if form in GATHERED else 1000.0

    monkeypatch.setattr(CostTable, "form_us", form_us)
    costs = table()
    monkeypatch.setattr(native, "library", lambda: object())
    (pick,) = costs.choose((GATHERS,), 1000)
    assert pick in GATHERED
    assert costs.choose((GATHERS,), 1000, fresh=True)[0] not in GATHERED
    monkeypatch.setattr(native, "library", lambda: None)
    assert costs.choose((GATHERS,), 1000)[0] not in GATHERED


# The tables that ship.


def test_shipped_tables_are_whole():
    shipped = shipped_tables()
    assert shipped.keys() == set(cpu_cost.DTYPES)
    assert {name: shipped[name].itemsize for name in shipped} == {"float32": 4, "bfloat16": 2}
    path = cpu_cost.Path(cpu_cost.__file__).with_name("cpu_costs.json")
    machine = json.loads(path.read_text())["machine"]
    assert machine.keys() == {"cpu", "instructions", "amx", "threads", "torch"}
    assert all(value != "" and value is not None for value in machine.values())
    for costs in shipped.values():
        assert [len(getattr(costs, part).axes) for part in cpu_cost.PRIMITIVES] == [*cpu_cost.AXES]


@pytest.fixture(scope="module")
def planned():
    """The groups of every linear layer in the papers' presets, and in plans by factor with the
    best Kronecker products of the same sizes."""
    found = set()
    for small in PRESETS.values():
        sizes = [
            (small.attention, 768, 768),
            (small.expand, 3072, 768),
            (small.contract, 768, 3072),
        ]
        found |= {(part.shape(out, inner, ""),) for part, out, inner in sizes}
    bert = BertConfig()
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    for sizes in (inventory(bert), inventory(minilm)):
        for factor in (2, 3, 4, 5, 6, 8, 10, 12, 15, 19, 21, 25, 30):
            plan = make_plan(sizes, KroneckerConfig(factor=factor))
            layers = {(x.size.out, x.size.inner): x for x in plan.converted}
            for (out, inner), layer in layers.items():
                if layer.size.kind == "linear":
                    found |= {layer.groups, best_product(out, inner, layer.weights)}
    assert {shape.low_rank for groups in found for shape in groups} == {True, False}
    return found


def best_product(out, inner, weights):
    """Of the Kronecker shapes in ``weights`` numbers, the one with the least predicted loss; the
    smallest where none is in."""
    shapes = sorted(shapes_of(out, inner), key=lambda shape: shape.parameters)
    small = [shape for shape in shapes if shape.parameters <= weights] or shapes[:1]
    return (min(small, key=lambda shape: predicted_loss(shape, out * inner, table=False)),)


@pytest.mark.parametrize("dtype", cpu_cost.DTYPES)
def test_shipped_tables_choose_for_every_planned_layer(dtype, planned):
    assert len(planned) > 30
    costs, picked = shipped_tables()[dtype], set()
    for groups, n, fresh in itertools.product(planned, ROWS, (False, True)):
        pick = costs.choose(groups, n, fresh=fresh)
        kernels = not fresh and native.library() is not None
        if pick != (DENSE,):
            for form, shape in zip(pick, groups, strict=True):
                assert form in forms_of(shape, kernels=kernels)
                assert prepared_numbers(form, shape) <= shape.out_features * shape.in_features
        picked.add(pick)
    assert len(picked) > 2  # the sizes decide
