"""Structures of equal size: never larger than the plan, what their names say, mistakes named."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import BertConfig

import kronbert
from kronbert.errors import DataError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = [
    "planned",
    "uniform",
    "single layers",
    "balanced layers",
    "mixed layers",
    "one-rank table",
    "1 x n table",
    "table by i ** -0.75",
    "table by i ** -0.5",
    "table by i ** -0.25",
    "more for all rows",
    "smaller table",
    "larger table",
]


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield Namespace(**vars(importlib.import_module("study_structures")))
        sys.modules.pop("study_structures")


@pytest.fixture(scope="module", params=[8, 19])
def plan(request):
    config = BertConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536
    )
    return kronbert.plan(config, factor=request.param)


def layers_of(plan, kinds):
    return [layer for layer in plan.converted if layer.size.kind in kinds]


@pytest.mark.parametrize("name", NAMES)
def test_a_structure_has_nearly_the_size_of_the_plan(study, plan, name):
    found = study.restructured(plan, name)
    assert set(study.STRUCTURES) == set(NAMES)
    assert 0.98 * plan.parameters <= found.parameters <= plan.parameters
    assert [x.size.name for x in found.converted] == [x.size.name for x in plan.converted]


@pytest.mark.parametrize(
    ("name", "groups"), [("single layers", 1), ("balanced layers", 1), ("mixed layers", 2)]
)
def test_layers_change_and_tables_stay(study, plan, name, groups):
    found = study.restructured(plan, name)
    assert layers_of(found, ("position",)) == layers_of(plan, ("position",))
    (before,), (table,) = (layers_of(one, ("embedding",)) for one in (plan, found))
    assert before.weights <= table.weights < 1.25 * before.weights
    for layer in layers_of(found, ("linear",)):
        assert len(layer.groups) == groups
        product = layer.groups[-1]
        assert not product.low_rank
        sides = (product.a_out, product.a_in, product.b_out, product.b_in)
        if name == "balanced layers":
            assert max(sides) <= 4 * min(sides)
        else:
            assert product.rank == 1
            reach = min(product.a_out, product.a_in) * min(product.b_out, product.b_in)
            assert 2 * reach >= min(layer.size.out, layer.size.inner)
        if name == "mixed layers":
            assert layer.groups[0].low_rank
            share = layer.groups[0].parameters / layer.weights
            assert 0.3 < share < 0.8


@pytest.mark.parametrize(("name", "part"), [("smaller table", 0.75), ("larger table", 1.25)])
def test_what_a_table_of_another_size_saves_the_layers_get(study, plan, name, part):
    found = study.restructured(plan, name)
    (before,), (table,) = (layers_of(one, ("embedding",)) for one in (plan, found))
    assert 0.97 * part * before.weights < table.weights <= part * before.weights
    assert len(table.groups) > 1  # blocks of rows
    was, now = (
        [layer.groups[0].rank for layer in layers_of(one, ("linear",))] for one in (plan, found)
    )
    assert all((b > a) == (part < 1) for a, b in zip(was, now, strict=True))


def test_a_law_by_itself_is_free_of_the_planners_share(study, plan):
    size = layers_of(plan, ("embedding",))[0].size
    _, by_law = study.STRUCTURES["table by i ** -0.5"]
    assert by_law(size, 400_000)[0].rank == 1
    shared, *others = study.blocks(size, 400_000)
    assert shared.rank > 1
    assert others


def test_more_for_all_rows_takes_it_from_the_frequent_words(study, plan):
    found = study.restructured(plan, "more for all rows")
    (before,), (table,) = (layers_of(one, ("embedding",)) for one in (plan, found))
    rank = (table.size.out + table.size.inner) / table.weights  # of the numbers, one for all rows
    assert abs(table.groups[0].parameters / table.weights - 0.75) < rank
    assert table.groups[0].rank > before.groups[0].rank
    first, had = (max(one.groups[1:], key=lambda s: s.rank) for one in (table, before))
    assert 0 < first.rank < had.rank


@pytest.mark.parametrize("name", ["one-rank table", "1 x n table"])
def test_tables_change_and_layers_stay(study, plan, name):
    found = study.restructured(plan, name)
    for layer, before in zip(*(layers_of(p, ("linear",)) for p in (found, plan)), strict=True):
        (shape,) = layer.groups
        assert shape.low_rank
        assert shape.rank >= before.groups[0].rank
    (table,) = layers_of(found, ("embedding",))
    (shape,) = table.groups
    assert shape.low_rank is (name == "one-rank table")
    assert (shape.rank == 1) is (name == "1 x n table")


def test_uniform_is_one_ratio_for_all(study, plan):
    found = study.restructured(plan, "uniform")
    ratios = [layer.size.weights / layer.weights for layer in found.converted]
    assert max(ratios) / min(ratios) < 1.15  # ranks are whole numbers
    planned = [layer.size.weights / layer.weights for layer in plan.converted]
    assert max(planned) / min(planned) > 1.5


def test_unknown_structures_are_named(study, plan):
    with pytest.raises(DataError, match=r"structure 'mixed': no such structure.*mixed layers"):
        study.restructured(plan, "mixed")
