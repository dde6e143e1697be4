"""The search: factors land where they should, on shapes that run fast, and say when they cannot."""

import math
import re
from dataclasses import replace
from itertools import pairwise, product

import pytest
from transformers import BertConfig, DistilBertConfig, RobertaConfig

from kronbert.config import KroneckerConfig
from kronbert.errors import PlanError
from kronbert.inventory import inventory
from kronbert.planning import Inventory, LayerSize, make_plan
from kronbert.search import (
    RUN_WEIGHTS,
    best_under,
    candidates,
    choose,
    fast,
    pareto,
    position_candidates,
    predicted_loss,
    shapes_of,
    svd_rank,
)
from kronbert.shapes import KroneckerShape, dense_flops, low_rank

CONFIGS = {
    "bert": BertConfig(),
    "minilm": BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "distilbert": DistilBertConfig(),
    "roberta": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
}
FACTORS = (2, 4, 8, 12, 19, 30)


@pytest.fixture(scope="module")
def sizes():
    return {name: inventory(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def plans(sizes):
    return {
        (name, factor): make_plan(sizes[name], KroneckerConfig(factor=factor))
        for name in CONFIGS
        for factor in FACTORS
    }


def linear(out=768, inner=768, group="attention"):
    return LayerSize(name="x", kind="linear", group=group, out=out, inner=inner)


def table(rows=1000, width=96):
    return LayerSize(name="t", kind="embedding", group="embedding", out=rows, inner=width)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("model", CONFIGS)
def test_a_plan_lands_on_its_factor(plans, model, factor):
    assert factor <= plans[model, factor].factor <= 1.03 * factor


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("model", CONFIGS)
def test_linear_layers_take_shapes_that_run_fast(plans, model, factor):
    plan = plans[model, factor]
    for layer in plan.converted:
        if layer.size.kind == "linear":
            (shape,) = layer.groups
            assert shape.low_rank or fast(shape), f"{layer.size.name}: {shape}"
            assert layer.flops < 0.75 * (2 * layer.size.inner - 1) * layer.size.out


@pytest.mark.parametrize("model", CONFIGS)
def test_everything_shrinks_together(plans, model):
    """No part is starved while another stays large: a larger factor shrinks tables and layers."""
    for group in ("embedding", "attention", "feed-forward"):
        ratios = [plans[model, factor].by_group()[group]["factor"] for factor in FACTORS]
        assert all(later >= 0.99 * one for one, later in pairwise(ratios)), group
    for factor in FACTORS:
        view = plans[model, factor].by_group()
        ratios = [view[name]["factor"] for name in ("embedding", "attention", "feed-forward")]
        assert max(ratios) <= 4 * factor
        assert min(ratios) >= factor / 4 or factor == 2


def test_position_tables_get_few_terms(plans):
    """They lie on a smooth curve: a quarter of a dense table's numbers is never needed."""
    for factor in (4, 8, 19, 30):
        layers = {p.size.name: p for p in plans["bert", factor].layers}
        assert layers["embeddings.position_embeddings"].weights < 512 * 768 / 4


@pytest.mark.parametrize(("rank", "kept"), [(4, 0.43), (8, 0.72), (16, 0.98), (64, 0.99)])
def test_the_law_of_positions_lies_on_minilm(rank, kept):
    (found,) = [c for c in position_candidates(512, 384) if c.groups == (low_rank(512, 384, rank),)]
    assert math.exp(-found.loss) == pytest.approx(kept, abs=0.07)


def test_layers_of_one_size_share_their_shapes(plans):
    shapes = {}
    for layer in plans["bert", 8].layers:
        key = (layer.size.group, layer.size.kind, layer.size.out, layer.size.inner)
        shapes.setdefault(key, set()).add(layer.groups)
    assert all(len(found) == 1 for found in shapes.values())


@pytest.mark.parametrize("factor", [1.02, 1.05])
def test_a_factor_near_one_takes_no_more_of_the_positions(factor):
    """They are a fifth of this model, and a third of their ranks was all that it kept."""
    many = BertConfig(
        hidden_size=256, intermediate_size=1024, vocab_size=8000, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    plan = make_plan(inventory(many), KroneckerConfig(factor=factor))
    assert factor <= plan.factor <= 1.03 * factor


@pytest.mark.parametrize("factor", [1.05, 1.5, 3.3, 26.7, 47.0])
def test_factors_in_between(sizes, factor):
    assert (
        factor <= make_plan(sizes["bert"], KroneckerConfig(factor=factor)).factor <= 1.03 * factor
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("4:2x2*384x384", True),
        ("5:2x2*384x384", False),  # too many large products
        ("2x1*384x768", False),  # a single column
        ("32x2*24x384", False),  # b has too few rows
        ("24x2*32x384", True),
        ("48x2*64x384", False),  # a is no tiny matrix
        ("2x2*48x48", True),  # 96 wide: large is less
        ("6x6*128x128", False),
        ("9:48x48*16x16", True),
        ("48x48*16x8", False),
    ],
)
def test_which_shapes_run_fast(spec, expected):
    assert fast(KroneckerShape.parse(spec)) is expected


@pytest.mark.parametrize(("out", "inner"), [(768, 768), (384, 1536), (99, 45)])
def test_shapes_save_numbers_and_flops_and_keep_half_of_the_rank(out, inner):
    for shape in shapes_of(out, inner):
        assert shape.parameters < out * inner
        assert shape.flops() <= dense_flops(out, inner)
        rank = shape.rank * min(shape.a_out, shape.a_in) * min(shape.b_out, shape.b_in)
        assert rank >= min(out, inner) / 2


def test_odd_widths_take_what_divides():
    layers = tuple(
        LayerSize(name=f"layer.{i}", kind="linear", group="feed-forward", out=99, inner=45)
        for i in range(4)
    )
    assert not any(fast(shape) for shape in shapes_of(99, 45))
    found = Inventory(layers=layers, parameters=4 * 99 * 45 + 400)
    plan = make_plan(found, KroneckerConfig(factor=3))
    assert plan.factor >= 3
    assert len(plan.converted) == 4


@pytest.mark.parametrize("model", CONFIGS)
def test_out_of_reach_names_a_factor_that_is_reached(sizes, model):
    with pytest.raises(
        PlanError, match="factor=5000 is out of reach: the smallest shapes"
    ) as caught:
        make_plan(sizes[model], KroneckerConfig(factor=5000))
    reach = float(re.search(r"Ask for at most ([\d.]+)", str(caught.value))[1])
    plan = make_plan(sizes[model], KroneckerConfig(factor=reach))
    assert reach <= plan.factor <= 1.03 * reach
    with pytest.raises(PlanError, match="out of reach"):
        make_plan(sizes[model], KroneckerConfig(factor=reach + 0.02))


def test_out_of_reach_because_too_much_is_kept(sizes):
    keep = ("*word_embeddings", "encoder.*")
    with pytest.raises(PlanError, match=r"in layers kept dense or ruled.*Keep less dense\."):
        make_plan(sizes["bert"], KroneckerConfig(factor=2, keep=keep))


def test_the_largest_factor_of_one_layer_is_reached():
    with pytest.raises(PlanError, match="out of reach for 768x768; the largest is") as caught:
        best_under(linear(), 9999)
    largest = float(re.search(r"largest is ([\d.]+)\. Ask", str(caught.value))[1])
    assert best_under(linear(), largest)


def test_a_plan_of_the_smallest_shapes():
    alone = Inventory(layers=(linear(),), parameters=768 * 768)
    assert make_plan(alone, KroneckerConfig(factor=384)).factor == 384


def test_a_rule_without_a_factor_still_converts():
    assert best_under(table(), 1.0)


@pytest.mark.parametrize("factor", [2, 4, 8, 16, 31.5])
def test_best_under_is_under_and_has_the_least_loss(factor):
    (shape,) = best_under(linear(), factor)
    assert shape.parameters * factor <= 768 * 768
    weight = RUN_WEIGHTS[0] if factor > 2 else RUN_WEIGHTS[1]  # the first leaves numbers unused
    found = {c.groups: c.loss for c in candidates(linear(), weight)}
    for groups, loss in found.items():
        if groups and groups[0].parameters * factor <= 768 * 768:
            assert found[(shape,)] <= loss


def test_candidates_trade_numbers_for_loss():
    for layer in (linear(), linear(3072), table()):
        found = candidates(layer, run_weight=0.0)
        assert found[-1].groups == ()
        for one, after in pairwise(found):
            assert one.weights < after.weights
            assert one.loss > after.loss
    assert pareto(reversed(found)) == found


def test_more_terms_and_more_numbers_predict_less_loss():
    losses = [
        predicted_loss(KroneckerShape(2, 16, 384, 48, rank), 768 * 768, table=False)
        for rank in (1, 2, 4, 31, 32)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
    svd = [predicted_loss(low_rank(1000, 96, r), 96_000, table=True) for r in (1, 4, 50, 96)]
    assert svd == sorted(svd, reverse=True)
    assert svd[-1] == 0.0


@pytest.mark.parametrize(
    ("spec", "squared_error"),
    [
        ("384x192*2x2", None),
        ("2x2*192x192", 0.32),
        ("4x4*96x96", 0.59),
        ("44:24x24*16x16", 0.22),
        ("48:384x1*1x384", 0.15),
        ("12:384x1*1x384", 0.37),
    ],
)
def test_the_law_lies_on_its_measurements(spec, squared_error):
    """Mean over query, value, output and wide matrix; the level is five matrices', a sixth less."""
    shape = KroneckerShape.parse(spec)
    predicted = 1 - math.exp(-predicted_loss(shape, 384 * 384, table=False))
    if squared_error is None:
        assert predicted > 0
    else:
        assert predicted == pytest.approx(squared_error, rel=0.25)


@pytest.mark.parametrize(
    ("n", "svd", "kronecker"), [(2, 0.21, 0.5), (4, 0.43, 0.75), (8, 0.62, 0.87)]
)
def test_the_law_of_tables(n, svd, kronecker):
    dense = 30522 * 384
    found = predicted_loss(low_rank(30522, 384, 384 // n), dense, table=True)
    assert 1 - math.exp(-found) == pytest.approx(svd, abs=0.02)
    found = predicted_loss(KroneckerShape(30522, 384 // n, 1, n), dense, table=True)
    assert 1 - math.exp(-found) == pytest.approx(kronecker, abs=0.01)


def test_svd_rank_is_the_rival_of_one_size():
    assert svd_rank(768, 768, 147_460) == low_rank(768, 768, 96)
    assert svd_rank(768, 768, 147_460).parameters <= 147_460
    assert svd_rank(768, 768, 10).rank == 1


@pytest.mark.parametrize(("count", "width", "rows"), [(12, 16, 56), (2, 24, 48)])
def test_the_mix_has_the_least_weighted_loss(count, width, rows):
    """Against every mix: the table, the positions, the pooler and the layers count so much."""
    depth = max(1, count / 6)
    counts, weights = (1, 1, 1, count), (2 * depth, depth / 4, 0.5, count)
    layers = [
        table(rows, width),
        LayerSize(name="p", kind="position", group="embedding", out=width, inner=width),
        replace(linear(width, width, "other"), name="o"),
        *(replace(linear(width, width), name=str(i)) for i in range(count)),
    ]
    total = sum(layer.weights for layer in layers)

    def weighed(mix, by, what):
        return sum(n * getattr(c, what) for n, c in zip(by, mix, strict=True))

    for factor in (3, 3.5, 4, 5, 6):
        found = choose(layers, 0, total, factor)
        for run_weight in RUN_WEIGHTS:
            ways = [candidates(layer, run_weight) for layer in layers[:4]]
            fit = (m for m in product(*ways) if weighed(m, counts, "weights") <= total / factor)
            best = min(fit, key=lambda mix: weighed(mix, weights, "loss"))
            if total / weighed(best, counts, "weights") <= 1.03 * factor:
                break
        mix = [
            next(c for c in way if c.groups == found[layer.name])
            for way, layer in zip(ways, layers, strict=False)
        ]
        assert weighed(mix, counts, "weights") <= total / factor
        least = weighed(best, weights, "loss")
        assert weighed(mix, weights, "loss") == pytest.approx(least)


@pytest.mark.parametrize("factor", [1.05, 1.5, 2, 2.4, 3, 8, 19])
def test_a_rules_factor_is_met_where_shapes_allow_it(factor):
    """Small ones too, of which shapes that save FLOPs would leave numbers unused."""
    layer = LayerSize(name="x", kind="linear", group="attention", out=768, inner=768)
    used = sum(shape.parameters for shape in best_under(layer, factor))
    assert factor <= layer.weights / used <= 1.03 * factor
