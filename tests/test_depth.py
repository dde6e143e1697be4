"""A model of fewer layers: which are kept, and what stays as it was."""

import pytest
import torch
from transformers import (
    EsmConfig,
    EsmModel,
    GPT2Config,
    GPT2Model,
    LongformerConfig,
    LongformerModel,
    ModernBertConfig,
    ModernBertModel,
    T5Config,
    T5Model,
)

import kronbert
from kronbert import PlanError
from kronbert.depth import spread_layers
from kronbert.distill.layer_maps import uniform
from tests.small_berts import IDS, classifier, masked_lm


@pytest.mark.parametrize(
    ("layers", "of", "kept"),
    [
        (4, 6, (1, 3, 4, 6)),
        (5, 6, (1, 2, 3, 4, 6)),
        (4, 12, (3, 6, 9, 12)),
        (1, 6, (6,)),
        (3, 3, (1, 2, 3)),
    ],
)
def test_layers_are_spread_and_the_last_is_kept(layers, of, kept):
    """Where 'uniform' is the layer map, each learns from the layer whose weights it has."""
    assert spread_layers(layers, of) == uniform(layers, of) == kept


@pytest.mark.parametrize("layers", [2, (1, 3), [1, 3]])
def test_weights_are_those_of_the_layers_that_are_kept(layers):
    model = classifier(num_hidden_layers=3)
    shallow = kronbert.fewer_layers(model, layers)
    state = model.state_dict()
    kept = {"encoder.layer.0.": "encoder.layer.0.", "encoder.layer.1.": "encoder.layer.2."}
    for name, value in shallow.state_dict().items():
        for mine, theirs in kept.items():
            if mine in name:
                name = name.replace(mine, theirs)
                break
        assert torch.equal(value, state[name]), name
        assert value.data_ptr() != state[name].data_ptr()
    assert len(shallow.bert.encoder.layer) == 2
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 3


def test_what_stays_as_it_was():
    model = masked_lm(num_hidden_layers=3).to(torch.bfloat16).train()
    model.bert.embeddings.requires_grad_(False)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    shallow = kronbert.fewer_layers(model, 2)
    assert torch.equal(torch.rand(3), expected)
    assert shallow.training
    assert {p.dtype for p in shallow.parameters()} == {torch.bfloat16}
    assert shallow.cls.predictions.decoder.weight is shallow.get_input_embeddings().weight
    frozen = {name for name, p in shallow.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert torch.equal(shallow.bert.embeddings.position_ids, model.bert.embeddings.position_ids)
    whole = kronbert.fewer_layers(model.eval(), 3)
    assert torch.equal(whole(IDS).logits, model(IDS).logits)
    assert whole.bert is not model.bert


def test_what_has_no_fewer_layers():
    model = classifier(num_hidden_layers=3)
    for layers in (0, 4):
        with pytest.raises(PlanError, match=rf"layers={layers}: expected 1 to 3"):
            kronbert.fewer_layers(model, layers)
    for layers in ((), (2, 1), (1, 1), (0, 2), (1, 4), (1.0, 2), "12", 1.5, None, True):
        with pytest.raises(PlanError, match="layers from 1 to 3 in ascending order"):
            kronbert.fewer_layers(model, layers)
    with pytest.raises(PlanError, match="Of a wrapper give the model inside"):
        kronbert.fewer_layers(torch.nn.Sequential(model), 1)
    with pytest.raises(PlanError, match="expected a model"):
        kronbert.fewer_layers("bert-base-uncased", 1)
    with pytest.raises(PlanError, match="converted or quantised before"):
        kronbert.fewer_layers(kronbert.convert(model, factor=3), 2)
    small = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    config = ModernBertConfig(vocab_size=384, num_hidden_layers=3, pad_token_id=0, **small)
    with pytest.raises(PlanError, match=r"'layers.1.attn_norm.weight'.*layer 1 .*from 2 of 3 on"):
        kronbert.fewer_layers(ModernBertModel(config), (2, 3))
    assert kronbert.fewer_layers(ModernBertModel(config), 2).config.num_hidden_layers == 2


def test_layers_that_know_their_place_are_refused():
    config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=20)
    assert kronbert.fewer_layers(GPT2Model(config), (1, 3)).config.num_hidden_layers == 2
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(PlanError, match="none can take another's place"):
        kronbert.fewer_layers(GPT2Model(config), (1, 3))


def test_what_has_no_class_of_fewer_layers():
    sides = T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=3, num_heads=4)
    with pytest.raises(PlanError, match=r"an encoder and a decoder\. Take the layers"):
        kronbert.fewer_layers(T5Model(sides), 2)
    contacts = EsmConfig(
        vocab_size=33, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=8, mask_token_id=32, pad_token_id=1,
    )  # fmt: skip
    with pytest.raises(
        PlanError, match=r"fewer_layers\(EsmModel, \(1, 3\)\): no model of its class"
    ):
        kronbert.fewer_layers(EsmModel(contacts), 2)
    windows = LongformerConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=8, attention_window=[2, 4, 6], max_position_embeddings=32,
    )  # fmt: skip
    assert kronbert.fewer_layers(LongformerModel(windows), 2).config.attention_window == [2, 6]
