"""What a plan is made from: sizes, kinds and ties of a model or of its config alone."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    GPT2Config,
    MobileBertConfig,
    RwkvConfig,
    RwkvModel,
    T5Config,
    T5Model,
)

import kronbert
from kronbert import PlanError
from kronbert.inventory import inventory, swap

SMALL = {
    "vocab_size": 384,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 144,
}


def test_bert_masked_lm():
    model = BertForMaskedLM(BertConfig(**SMALL))
    found = inventory(model)
    layers = {x.name: x for x in found.layers}
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.model_type == "bert"
    assert {x.name: (x.kind, x.group, x.out, x.inner) for x in found.layers} == {
        "bert.embeddings.word_embeddings": ("embedding", "embedding", 384, 48),
        "bert.embeddings.position_embeddings": ("position", "embedding", 144, 48),
        "bert.embeddings.token_type_embeddings": ("embedding", "embedding", 2, 48),
        **{
            f"bert.encoder.layer.0.attention.{name}": ("linear", "attention", 48, 48)
            for name in ("self.query", "self.key", "self.value", "output.dense")
        },
        "bert.encoder.layer.0.intermediate.dense": ("linear", "feed-forward", 96, 48),
        "bert.encoder.layer.0.output.dense": ("linear", "feed-forward", 48, 96),
        "cls.predictions.transform.dense": ("linear", "other", 48, 48),
        "cls.predictions.decoder": ("head", "embedding", 384, 48),
    }
    assert layers["cls.predictions.decoder"].tied_to == "bert.embeddings.word_embeddings"
    assert layers["cls.predictions.decoder"].weights == 0
    assert "2 rows are too few" in layers["bert.embeddings.token_type_embeddings"].dense_because


def test_gpt2_stores_its_weights_transposed_and_has_names_of_its_own():
    sizes = {"vocab_size": 384, "n_positions": 144, "n_embd": 48, "n_layer": 1, "n_head": 4}
    found = inventory(GPT2Config(**sizes)).layers
    assert {x.name: (x.kind, x.group, x.out, x.inner) for x in found} == {
        "wte": ("embedding", "embedding", 384, 48),
        "wpe": ("position", "embedding", 144, 48),
        "h.0.attn.c_attn": ("conv1d", "attention", 144, 48),
        "h.0.attn.c_proj": ("conv1d", "attention", 48, 48),
        "h.0.mlp.c_fc": ("conv1d", "feed-forward", 192, 48),
        "h.0.mlp.c_proj": ("conv1d", "feed-forward", 48, 192),
    }


def test_a_table_of_less_than_128_rows_stays_dense():
    reasons = [inventory(nn.Embedding(rows, 12)).layers[0].dense_because for rows in (127, 128)]
    assert reasons == ["127 rows are too few to be worth a product", None]


def test_weights_that_a_model_reads_itself_stay_dense():
    deberta = DebertaV2Config(**SMALL, relative_attention=True, position_buckets=128)
    mobile = MobileBertConfig(
        **SMALL,
        embedding_size=24,
        intra_bottleneck_size=48,
        architectures=["MobileBertForMaskedLM"],
    )
    found = {
        x.name: (x.out, x.dense_because)
        for config in (deberta, mobile)
        for x in inventory(config).layers
        if x.dense_because and "directly" in x.dense_because
    }
    assert found == {
        "encoder.rel_embeddings": (256, "the model reads its weight directly"),
        "mobilebert.embeddings.word_embeddings": (
            384,
            "the masked-LM head reads its weight directly",
        ),
        "cls.predictions.dense": (24, "the model reads its weight directly"),
    }


def test_a_config_gives_what_its_model_gives():
    config = BertConfig(**SMALL, architectures=["BertForMaskedLM"])
    assert inventory(config) == inventory(BertForMaskedLM(config))
    config = BertConfig(**SMALL)
    assert inventory(config) == inventory(BertModel(config))


def test_a_config_takes_no_memory():
    """A table of 400 GB is only counted."""
    big = inventory(BertConfig(**{**SMALL, "vocab_size": 2 * 10**9}))
    assert big.parameters > 9 * 10**10


def test_an_untied_decoder_is_a_linear():
    config = BertConfig(**SMALL, tie_word_embeddings=False)
    decoder = inventory(BertForMaskedLM(config)).layers[-1]
    assert (decoder.kind, decoder.tied_to, decoder.weights) == ("linear", None, 384 * 48)


def test_other_shared_weights_stay_dense():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    reasons = [layer.dense_because for layer in inventory(model).layers]
    assert reasons == ["it shares its weight with '2'", None, "it shares its weight with '0'"]
    assert [layer.weights for layer in inventory(model).layers] == [144, 144, 0]


def test_a_table_of_two_sides_is_counted_once_and_named():
    config = T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    plan = kronbert.plan(config, factor=1.2)
    dense = sum(group["dense"] for group in plan.by_group().values())
    norms = sum(p.numel() for n, p in T5Model(config).named_parameters() if "layer_norm" in n)
    assert dense == plan.dense_parameters - norms
    assert kronbert.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(
        PlanError, match=r"'shared', with 6,400 parameters, cannot be converted: it"
    ):
        kronbert.plan(config, factor=9)
    groups = {layer.size.group for layer in plan.layers if "Attention" in layer.size.name}
    assert groups == {"attention", "embedding"}  # the bias of places is a table


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("composition.tokens", "embedding"),
        ("embeddings.position_embeddings", "position"),
        ("embed_positions", "position"),
        ("pos_embedding", "position"),
        ("transformer.wpe", "position"),
        ("x_position_embeddings", "position"),
    ],
)
def test_which_tables_are_of_positions(name, kind):
    model = nn.Module()
    *parents, leaf = name.split(".")
    inner = model
    for parent in parents:
        inner.add_module(parent, nn.Module())
        inner = inner.get_submodule(parent)
    inner.add_module(leaf, nn.Embedding(200, 8))
    assert [layer.kind for layer in inventory(model).layers] == [kind]


def test_weights_that_the_model_changes_in_place_stay_dense():
    """RWKV halves some every few layers in eval mode: a product's would be lost."""
    config = RwkvConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=4, attention_hidden_size=16,
        intermediate_size=32, rescale_every=2, context_length=16,
    )  # fmt: skip
    model, ids = RwkvModel(config).eval(), torch.randint(60, (2, 8))
    rules = {"re:.*(attention.(key|value|output)|feed_forward.(key|value))": {"rank": 16}}
    student = kronbert.convert(model, rules=rules).eval()
    kept = [x.size.name for x in student.kronecker_plan.layers if x.size.name.endswith("output")]
    assert all("in place" in x.dense_because for x in inventory(model).layers if x.name in kept)
    torch.testing.assert_close(student(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_options_without_a_kronecker_form_stay_dense(option):
    (layer,) = inventory(nn.Embedding(200, 12, **option)).layers
    assert "have no Kronecker form" in layer.dense_because


def test_subclasses_are_left_alone():
    assert inventory(nn.MultiheadAttention(12, 2)).layers == ()


def test_refusals():
    with pytest.raises(PlanError, match=r"plan\(str\): expected a model .*AutoConfig"):
        inventory("bert-base-uncased")
    config = AutoConfig.for_model("bert", architectures=["MyBert"])
    with pytest.raises(PlanError, match=r"'MyBert', which transformers does not have"):
        inventory(config)
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(PlanError, match="before sharding"):
        inventory(model)


def test_swap_reaches_every_place_of_a_module():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(3, 3))})
    new = nn.Identity()
    swap(model, {"a": new})
    assert model["a"] is new
    assert model["b"][0] is new
    assert isinstance(model["b"][1], nn.Linear)


def test_a_weight_shared_with_what_is_not_listed_stays_dense():
    class Table(nn.Embedding):
        """As BART's scaled one: it may compute something else."""

    model = nn.Sequential(Table(300, 16), nn.Linear(16, 16), nn.Linear(16, 300, bias=False))
    model[2].weight = model[0].weight
    assert {layer.name: layer.dense_because for layer in inventory(model).layers} == {
        "1": None, "2": "it shares its weight with '0.weight'"
    }  # fmt: skip
    student = kronbert.convert(model, rules={"1": {"rank": 2}})
    assert student[2].weight is student[0].weight
    assert sum(p.numel() for p in student.parameters()) == student.kronecker_plan.parameters
    bare = nn.Linear(16, 300)
    bare.register_parameter("also", bare.weight)
    bare = nn.Sequential(nn.Linear(16, 16), bare)
    bare.register_parameter("table", bare[1].weight)
    assert inventory(bare).layers[1].dense_because == "it shares its weight with 'table'"
