"""The presets: the papers' totals on BERT-base to the last parameter, FLOPs, other sizes."""

import pytest
from transformers import BertConfig, RobertaConfig

from kronbert.config import KroneckerConfig
from kronbert.errors import PlanError, ShapeError
from kronbert.inventory import inventory
from kronbert.planning import make_plan
from kronbert.presets import PRESETS, preset


@pytest.fixture(scope="module")
def bert():
    return inventory(BertConfig())


# papers.md 1.3, row "total, dense pooler", and one transformer layer's six matrices.
@pytest.mark.parametrize(
    ("name", "total", "factor", "attention", "feed_forward", "embedding"),
    [
        ("k5", 20_762_508, 5.27, 73_856, 589_888, 1_953_420),
        ("k8", 14_654_216, 7.47, 147_460, 147_472, 2_930_120),
        ("k19", 5_716_620, 19.15, 18_464, 73_760, 1_953_420),
        ("k21", 5_228_272, 20.94, 18_464, 73_760, 1_465_072),
    ],
)
def test_totals_on_bert_base(bert, name, total, factor, attention, feed_forward, embedding):
    plan = make_plan(bert, KroneckerConfig(preset=name))
    assert plan.dense_parameters == 109_482_240
    assert plan.parameters == total
    assert plan.factor == pytest.approx(factor, abs=0.005)
    weights = {}
    for layer in plan.converted:
        weights.setdefault(layer.size.group, set()).add(layer.weights)
    assert weights == {
        "attention": {attention},
        "feed-forward": {feed_forward},
        "embedding": {embedding},
    }
    assert len(plan.converted) == 12 * 6 + 1


@pytest.mark.parametrize(("name", "gflop"), [("k8", 5.475), ("k21", 1.403), ("k5", 9.232)])
def test_linear_flops_on_bert_base(bert, name, gflop):
    plan = make_plan(bert, KroneckerConfig(preset=name))
    # Adding k5's four terms up is counted here, and not in the papers.
    sums = 128 * sum((p.groups[0].rank - 1) * p.size.out for p in plan.converted)
    assert (plan.linear_flops(128) - sums) / 1e9 == pytest.approx(gflop, abs=5e-4)
    assert plan.linear_flops(128, dense=True) / 1e9 == pytest.approx(21.73, abs=0.005)


def test_one_transformer_layer_with_biases_and_norms(bert):
    """papers.md 1.3: 231,360 and 894,768."""
    rest = 9 * 768 + 3072 + 2 * 768 - 768 * 2  # six biases (3,072 wide once), two norms
    for name, expected in (("k21", 231_360), ("k8", 894_768)):
        plan = make_plan(bert, KroneckerConfig(preset=name))
        layer = [p.weights for p in plan.layers if p.size.name.startswith("encoder.layer.5.")]
        assert len(layer) == 6
        assert sum(layer) + rest == expected


def test_flops_order_is_chosen_per_matrix(bert):
    plan = make_plan(bert, KroneckerConfig(preset="k21"))
    order = {layer.size.name: layer.groups[0].order for layer in plan.converted}
    assert order["encoder.layer.0.intermediate.dense"] == "b"
    assert order["encoder.layer.0.output.dense"] == "a"


def test_a_preset_fits_other_widths():
    plan = make_plan(inventory(RobertaConfig(vocab_size=500, num_hidden_layers=1)), _k21())
    assert {str(p.groups[0]) for p in plan.converted} == {
        "500x48⊗1x16",
        "384x48⊗2x16",
        "16x2⊗192x384",
        "2x16⊗384x192",
    }


def test_a_preset_that_does_not_divide_says_which_layer():
    narrow = BertConfig(hidden_size=36, intermediate_size=80, num_attention_heads=4, vocab_size=200)
    with pytest.raises(
        ShapeError, match=r"'embeddings.word_embeddings' \(preset 'k21'\).*1x16 does"
    ):
        make_plan(inventory(narrow), _k21())


def test_names():
    assert preset("K8") is PRESETS["k8"]
    with pytest.raises(PlanError, match=r"preset='k9' is unknown. Nearest: .*'k19'"):
        preset("k9")
    with pytest.raises(PlanError, match="preset=8 is unknown"):
        preset(8)


def _k21():
    return KroneckerConfig(preset="k21")
