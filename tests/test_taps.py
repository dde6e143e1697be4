"""Taps: the right tensors from every architecture, with gradients, without touching the model."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kronbert.distill.taps import TAP_MAPS, TAPS, TapMap, Taps, inputs_of
from kronbert.errors import DistillError

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
TEXT: dict[str, Any] = SIZES | {"vocab_size": 50, "max_position_embeddings": 40}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(**TEXT),
    "roberta": transformers.RobertaConfig(**TEXT),
    "xlm-roberta": transformers.XLMRobertaConfig(**TEXT),
    "electra": transformers.ElectraConfig(**TEXT, embedding_size=12),
    "distilbert": transformers.DistilBertConfig(
        dim=24, n_layers=2, n_heads=3, hidden_dim=40, vocab_size=50
    ),
    "mobilebert": transformers.MobileBertConfig(
        **TEXT, embedding_size=12, intra_bottleneck_size=12, num_feedforward_networks=2
    ),
    "deberta-v2": transformers.DebertaV2Config(
        **TEXT | {"share_att_key": True}, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "vit": transformers.ViTConfig(**SIZES, image_size=12, patch_size=6),
    "modernbert": transformers.ModernBertConfig(
        **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, vocab_size=50, n_positions=40, pad_token_id=0
    ),
}
DEPTHS = {"mobilebert": 4}  # what a head is wide when it is not hidden / heads


def a_model(kind: str, **changes: Any) -> Any:
    config = CONFIGS[kind].__class__.from_dict(CONFIGS[kind].to_dict() | changes)
    auto: Any = (
        transformers.AutoModelForImageClassification
        if kind == "vit"
        else transformers.AutoModelForSequenceClassification
    )
    return auto.from_config(config).eval()


def a_batch(kind: str) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12)}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(3, 50, (2, 7)), "attention_mask": mask}


def needs_of(kind: str) -> set[str]:
    return set(TAPS) - ({"scores"} if kind == "gpt2" else set())


def test_every_known_architecture_is_tested():
    assert set(CONFIGS) == set(TAP_MAPS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_shapes_and_gradients(kind):
    model, batch = a_model(kind), a_batch(kind)
    model.train()
    with Taps(model, needs_of(kind)).capture() as seen:
        model(**batch)
    tokens = 5 if kind == "vit" else 7
    assert seen.embedding is not None
    assert seen.embedding.shape == (2, tokens, 24)
    assert [x.shape for x in seen.ffn.values()] == [(2, tokens, 24)] * 2
    assert seen.logits.shape == (2, 2)
    taps = [seen.embedding, *seen.ffn.values(), seen.logits]
    if kind != "gpt2":
        shape = (2, 3, tokens, DEPTHS.get(kind, 8))
        assert [x.shape for x in (*seen.query.values(), *seen.key.values())] == [shape] * 4
        taps += [*seen.query.values(), *seen.key.values()]
    torch.stack([x.square().sum() for x in taps]).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_states_are_the_models_own(kind):
    model, batch = a_model(kind), a_batch(kind)
    with torch.no_grad(), Taps(model, {"embedding", "ffn", "sentence"}).capture() as seen:
        hidden = model(**batch, output_hidden_states=True).hidden_states
        last = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(seen.last, last)
    assert seen.embedding is not None
    torch.testing.assert_close(seen.embedding, hidden[0])
    torch.testing.assert_close(seen.ffn[1], hidden[1])


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"gpt2", "deberta-v2"}))
def test_scores_are_the_models_before_softmax(kind):
    model, batch = a_model(kind, attn_implementation="eager"), a_batch(kind)
    model.set_attn_implementation("eager")
    for p in model.parameters():  # large enough for probabilities far from uniform
        nn.init.normal_(p)
    with torch.no_grad(), Taps(model, {"scores"}).capture() as seen:
        probabilities = model(**batch, output_attentions=True).attentions
    mask = batch.get("attention_mask", torch.ones(2, 5))
    for layer in (1, 2):
        q, k = seen.query[layer], seen.key[layer]
        scores = q @ k.mT / q.shape[-1] ** 0.5
        ours = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf).log_softmax(-1).exp()
        assert probabilities[layer - 1].amax() > 0.5
        rows = mask[:, None, :, None].bool().expand_as(ours)
        torch.testing.assert_close(ours[rows], probabilities[layer - 1][rows])


def test_deberta_scores_are_the_content_part():
    # No position parts: then content to content is all there is.
    model = a_model("deberta-v2", pos_att_type=[], relative_attention=False)
    with torch.no_grad(), Taps(model, {"scores"}).capture() as seen:
        probabilities = model(**a_batch("vit") | a_batch("deberta-v2"), output_attentions=True)
    first = probabilities.attentions[0][0]  # the first sequence has no padding
    ours = (seen.query[1] @ seen.key[1].mT / 8**0.5)[0].softmax(-1)
    torch.testing.assert_close(ours, first)


def test_sdpa_stays():
    model = a_model("bert")
    model.set_attn_implementation("sdpa")
    with Taps(model, TAPS).capture():
        out = model(**a_batch("bert"))
    assert model.config._attn_implementation == "sdpa"
    assert out.attentions is None
    assert out.hidden_states is None


def test_only_the_needed_layers_are_kept():
    model = a_model("bert")
    with Taps(model, {"ffn"}, layers=[2]).capture() as seen:
        model(**a_batch("bert"))
    assert list(seen.ffn) == [2]
    assert not seen.query
    assert seen.embedding is None


def test_a_second_pass_replaces_the_first_and_finish_the_output():
    model, one, two = a_model("bert"), a_batch("bert"), a_batch("bert")
    with Taps(model, {"embedding"}).capture(lambda seen: "mine") as seen:
        assert model(**one) == "mine"
        model(**two)
    with torch.no_grad():
        torch.testing.assert_close(seen.embedding, model.bert.embeddings(two["input_ids"]))


# transformers 5.23 has a new name for it, which 5.17 has not.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", ["bert", "modernbert", "vit"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model, batch = a_model(kind), a_batch(kind)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(1)
        with Taps(model.train(), TAPS).capture() as seen:
            model(**batch)
        loss = torch.stack([(q @ k.mT).square().mean() for q, k in paired(seen)]).sum()
        (loss + seen.ffn[2].square().mean() + seen.logits.square().mean()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[0], grads[1])


def paired(seen):
    return zip(seen.query.values(), seen.key.values(), strict=True)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_reentrant_checkpointing_is_refused():
    model = a_model("bert").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        Taps(model, {"scores"}).capture(),
        pytest.raises(DistillError, match=r"use_reentrant=True hides it\. Pass gradient_checkp"),
    ):
        model(**a_batch("bert"))


def test_question_answering_logits_and_their_mask():
    model = transformers.BertForQuestionAnswering(CONFIGS["bert"])
    with Taps(model, {"logits"}).capture() as seen:
        out = model(**a_batch("bert"))
    torch.testing.assert_close(seen.logits[:, 1], out.end_logits)
    mask = seen.logits_mask(a_batch("bert")["attention_mask"])
    assert mask is not None
    assert mask.shape == (2, 1, 7)


def test_another_architecture_with_a_map():
    config = transformers.AlbertConfig(**TEXT, embedding_size=24, num_labels=3)
    model = transformers.AlbertForSequenceClassification(config)
    with pytest.raises(DistillError, match=r"'albert' has no tap map. Known: bert, .*TapMap\("):
        Taps(model, {"ffn"})
    names = TapMap(embedding="embeddings", layer="encoder.albert_layer_groups.0")
    with Taps(model, {"ffn"}, [1], tap_map=names).capture() as seen:
        model(**a_batch("bert"))
    assert seen.ffn[1].shape == (2, 7, 24)
    with Taps(model, {"logits"}).capture() as seen:  # needs no map
        model(**a_batch("bert"))
    assert seen.logits.shape == (2, 3)


def test_inputs_behind_wrappers():
    """PEFT's classifiers name some of what they take and hand on the rest."""
    model = a_model("bert")

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def get_base_model(self):
            return self.inner

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    class Nameless(nn.Module):
        def forward(self, *args, **kwargs):
            return model(*args, **kwargs)

    known = inputs_of(model)
    assert {"input_ids", "token_type_ids", "attention_mask", "labels"} <= known
    assert known.isdisjoint({"args", "kwargs", "self"})
    assert inputs_of(torch.compile(model, backend="eager")) == known
    assert inputs_of(Adapted()) == known
    with pytest.raises(DistillError, match=r"Nameless.forward names no inputs .*model inside"):
        inputs_of(Nameless())


def test_what_taps_refuse():
    with pytest.raises(DistillError, match=r"GPT2.*its attention is causal.*Use the terms emb"):
        Taps(a_model("gpt2"), {"scores"})
    with pytest.raises(DistillError, match=r"Taps\(needs=\['hidden'\]\): expected any of"):
        Taps(a_model("bert"), {"hidden"})
    model = a_model("bert")
    with pytest.raises(DistillError, match=r"has no module 'encoder.layer.6.attention.self.query'"):
        Taps(model, {"scores"}, layers=[7])
    with Taps(model.bert, {"logits"}).capture() as seen:
        model.bert(**a_batch("bert"))
    with pytest.raises(DistillError, match="has no logits: the model has no head"):
        _ = seen.logits
    taps = Taps(model, {"ffn"})
    model.bert.encoder.layer[1] = copy.deepcopy(model.bert.encoder.layer[1])
    with taps.capture(), pytest.raises(DistillError, match="ffn of layer 2 were not called"):
        model(**a_batch("bert"))


def test_layers_that_share_a_module_are_refused():
    config = transformers.AlbertConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=24,
    )  # fmt: skip
    model = transformers.AlbertModel(config)
    shared = TapMap(embedding="embeddings", layer="encoder.albert_layer_groups.0.albert_layers.0")
    with pytest.raises(DistillError, match="AlbertModel: its layers share one module"):
        Taps(model, {"ffn"}, tap_map=shared)
    with Taps(model, {"embedding"}, tap_map=shared).capture() as seen:
        model(torch.ones(2, 5, dtype=torch.long))
    assert seen.embedding.shape == (2, 5, 8)


def test_a_pass_without_gradients_inside():
    model = a_model("bert").train()
    with Taps(model, {"ffn"}).capture() as seen:
        with torch.no_grad():
            model(**a_batch("bert"))
    assert not seen.ffn[1].requires_grad


def test_outputs_that_are_a_dict():
    """As transformers' Trainer takes them of one's own models."""
    model = a_model("bert")

    class Own(nn.Module):
        config = model.config
        base_model = model.bert

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return {"loss": torch.ones(()), "logits": self.model(input_ids).logits}

    own = Own()
    with Taps(own, {"logits"}).capture() as seen:
        given = own(a_batch("bert")["input_ids"])
    assert torch.equal(seen.logits, given["logits"])
    assert seen.outputs.loss == 1
