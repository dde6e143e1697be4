"""Fused blocks: the same model in fewer calls, whatever it is given."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kronbert
from kronbert import blocks
from kronbert.fusion import fuse, unfuse
from tests.fusion_models import (
    CONFIGS,
    CONVERTED,
    DENSE,
    EMBEDDINGS,
    IDS,
    INPUTS,
    PRE_NORM,
    PRE_NORM_CONVERTED,
    TABLE,
    a_model,
    assert_same,
    gradients,
    rules_of,
    scores,
    twins,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused call ran; what one makes of another is not counted."""
    seen: Counter[str] = Counter()
    inside: list[str] = []

    def spy(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            seen[name] += not inside
            inside.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                inside.pop()

        return counted

    for name in CONVERTED | DENSE | PRE_NORM_CONVERTED:
        monkeypatch.setattr(blocks, name, spy(name, getattr(blocks, name)))
    return seen


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_model(name, converted, calls):
    ours, plain = twins(name, converted=converted)
    expected = CONVERTED if converted else DENSE
    if name == "modernbert":
        expected = PRE_NORM_CONVERTED if converted else PRE_NORM
    state = plain.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in plain.named_modules()]
    for model in (ours, plain):
        model.eval()
    assert_same(scores(ours), scores(plain))
    assert calls == expected
    for model in (ours, plain):
        model.train()
    found, wanted = gradients(ours), gradients(plain)
    assert set(found) == set(wanted)
    assert_same(found, wanted)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    unfuse(ours)
    kinds = [type(module) for module in plain.modules()]
    assert [type(module) for module in ours.modules()] == kinds
    assert [set(vars(m)) for m in ours.modules()] == [set(vars(m)) for m in plain.modules()]
    calls.clear()
    assert_same(scores(ours), scores(plain))
    assert not calls


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_attentions(name, converted, calls):
    """transformers finds what it records by class, and leaves its hooks on the model."""
    ours, plain = twins(name, converted=converted, attn_implementation="eager")
    for _ in range(2):
        found = ours(**INPUTS, output_hidden_states=True, output_attentions=True)
        wanted = plain(**INPUTS, output_hidden_states=True, output_attentions=True)
        assert len(found.hidden_states) == 3
        assert len(found.attentions) == 2
        assert_same(found.hidden_states, wanted.hidden_states)
        assert_same(found.attentions, wanted.attentions)
        assert_same(found.logits, wanted.logits)
    if name == "modernbert":
        assert calls["add_norm"] == 4
        assert calls["gated_ffn"] == (4 if converted else 0)
    elif converted:
        assert calls["ffn_norm"] == calls["qkv"] == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_the_planners_own_shapes(name, calls):
    ours, plain = twins(name, planned=True)
    linear = [x for x in plain.kronecker_plan.converted if x.size.kind == "linear"]
    assert all(shape.low_rank for layer in linear for shape in layer.groups)
    assert len(linear) >= 8
    found, wanted = gradients(ours), gradients(plain)
    assert set(found) == set(wanted)
    assert_same(found, wanted)
    assert calls == (PRE_NORM_CONVERTED if name == "modernbert" else CONVERTED)
    assert_same(scores(ours.eval()), scores(plain.eval()))


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("converted", [True, False], ids=["converted", "dense"])
def test_embedding_inputs(name, converted, calls):
    ours, plain = twins(name, converted=converted, type_vocab_size=3)
    positions = torch.tensor([[4, 0, 3, 9, 12, 7, 2]])
    kinds = torch.tensor([[0, 0, 1, 1, 2, 2, 0], [2, 1, 0, 1, 2, 0, 0]])
    for more in ({"position_ids": positions}, {"token_type_ids": kinds}, {"position_ids": kinds}):
        assert_same(gradients(ours, **INPUTS, **more), gradients(plain, **INPUTS, **more))
    assert calls["embed_norm"] == 3
    width = plain.get_input_embeddings().embedding_dim
    vectors = torch.randn(2, 7, width)
    assert_same(
        scores(ours, inputs_embeds=vectors, token_type_ids=kinds),
        scores(plain, inputs_embeds=vectors, token_type_ids=kinds),
    )
    found, expected = (
        model.base_model.embeddings(input_ids=IDS, inputs_embeds=vectors) for model in (ours, plain)
    )
    assert_same(found, expected)
    assert calls["embed_norm"] == 3


def test_packed_sequences():
    """Several sequences in one row, longer together than there are positions."""
    ours, plain = twins()
    ids, positions = IDS.repeat(1, 4).view(1, 56), torch.arange(14).repeat(1, 4)
    inputs = {"input_ids": ids, "position_ids": positions}
    assert_same(scores(ours, **inputs), scores(plain, **inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_with_blocks_of_rows(name, calls):
    """Ids in no block, in one and in two, and the padding entry in one."""
    width = 12 if name == "electra" else 24
    spec = f"2:130x1*1x{width} + 3:9x1*1x{width} + 1:20x1*1x{width}@5 + 2:64x2*1x{width // 2}@66"
    dense = a_model(name, converted=False)
    plain = kronbert.convert(dense, rules=rules_of(name) | {TABLE: spec})
    tables = [m for m in plain.modules() if isinstance(m, kronbert.KroneckerEmbedding)]
    assert [table.starts for table in tables] == [(0, 0, 5, 66)]
    ours = fuse(copy.deepcopy(plain))
    found, wanted = gradients(ours), gradients(plain)
    assert calls["embed_norm"] == 1
    assert any(key.endswith("_embeddings.a_3") for key in found)
    assert_same(found, wanted)
    for model in (ours, plain):
        model.eval()
    with torch.no_grad():
        expected = scores(plain)
        assert_same(scores(ours), expected)
        assert_same(scores(unfuse(ours)), expected)


def test_padding_gets_no_gradient():
    ours, _ = twins("roberta", converted=False, pad_token_id=1)
    ids = torch.tensor([[5, 7, 1, 1]])
    found = gradients(ours, input_ids=ids)
    words = found["roberta.embeddings.word_embeddings.weight"]
    assert words[5].any()
    assert not words[1].any()
    places = found["roberta.embeddings.position_embeddings.weight"]
    assert places[2].any()
    assert not places[1].any()


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_tables_that_are_more_than_read_stay_ordinary(options, calls):
    ours, plain = twins(converted=False)
    for model in (ours, plain):
        for option, value in options.items():
            setattr(model.bert.embeddings.word_embeddings, option, value)
    assert_same(gradients(ours), gradients(plain))
    assert not calls["embed_norm"]


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_dropout(name):
    """Two seeds differ, one repeats, evaluation drops nothing, and the mean is kept."""
    ours, plain = twins(name, dropout=0.3)
    draws = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        draws.append(scores(ours))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert_same(scores(ours.eval()), scores(plain.eval()))


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "dense"])
def test_dropout_probability(converted):
    """An output of ones, dropped, then normed: what was kept comes out positive."""
    ours = fuse(a_model(converted=converted, dropout=0.25))
    layer = ours.bert.encoder.layer[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for output in (layer.attention.output, layer.output):
            output.dense.bias.fill_(1.0)
            output.LayerNorm.weight.fill_(1.0)
    residual = torch.zeros(1, 400, 24)
    calls = (
        lambda: layer.attention.output(residual, residual),
        lambda: layer.feed_forward_chunk(residual),
    )
    for call in calls:
        kept = (call() > 0).float().mean().item()
        assert abs(kept - 0.75) < 0.02, "9600 draws: 4.5 standard deviations"
    layer.eval()
    for call in calls:
        assert not call().any()
    layer.output.dropout.train()  # Monte Carlo dropout: one module's own mode counts
    assert calls[1]().any()
    assert not calls[0]().any()


def test_chunked_feed_forward(calls):
    for name in ("bert", "distilbert"):
        ours, plain = twins(name, chunk_size_feed_forward=7)
        inputs = {"input_ids": IDS.view(1, 14)}
        assert_same(gradients(ours, **inputs), gradients(plain, **inputs))
    assert calls["ffn_norm"] == 4  # BERT's layer works on chunks, DistilBERT's half is chunked


@pytest.mark.parametrize("name", ["bert", "distilbert"])
@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_python", F.gelu])
def test_other_activations(name, activation, calls):
    key = "activation" if name == "distilbert" else "hidden_act"
    ours, plain = twins(name, **{key: activation} if isinstance(activation, str) else {})
    if not isinstance(activation, str):
        for module in (*ours.modules(), *plain.modules()):
            for part in ("intermediate_act_fn", "activation"):
                if part in module._modules:
                    delattr(module, part)
                    setattr(module, part, activation)
    assert_same(gradients(ours), gradients(plain))
    assert not calls["ffn_norm"]
    assert calls["linear_norm"] + calls["residual_norm"] == 4


def test_parametrised_and_subclassed_parts_stay_ordinary(calls):
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class Shifted(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    ours, plain = twins()
    for model in (ours, plain):
        first, second = model.bert.encoder.layer
        parametrize.register_parametrization(first.output.LayerNorm, "weight", Doubled())
        second.attention.output.LayerNorm.__class__ = Shifted
    assert_same(gradients(ours), gradients(plain))
    assert calls == EMBEDDINGS + Counter({"qkv": 2, "linear_norm": 1, "ffn_norm": 1})


def test_decoder(calls):
    """A decoder's query, key and value meet a cache and stay ordinary; so does cross-attention."""
    ours, plain = twins(head="CausalLM", is_decoder=True)
    found, expected = (
        m.eval().generate(IDS[:, :4], max_new_tokens=5, pad_token_id=0) for m in (ours, plain)
    )
    assert found.shape[1] > 4
    assert torch.equal(found, expected)
    encoder, cache = fuse(a_model()), transformers.DynamicCache()
    encoder.bert.encoder.layer[0].attention.self(torch.randn(2, 7, 24), past_key_values=cache)
    assert cache.get_seq_length() == 7
    assert not calls["qkv"]
    ours, plain = twins(head="CausalLM", is_decoder=True, add_cross_attention=True)
    inputs = {**INPUTS, "encoder_hidden_states": torch.randn(2, 5, 24), "use_cache": False}
    assert_same(gradients(ours, **inputs), gradients(plain, **inputs))
    assert not calls["qkv"]
    assert calls["ffn_norm"]


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_keeps_hidden_states_as_the_dense_model_does(name):
    """bfloat16 products, and what lies between them in float32; with gradients and without."""
    ours, plain = twins(name)
    dense = kronbert.merge(plain)
    for gradients_too in (True, False):
        with torch.set_grad_enabled(gradients_too), torch.autocast("cpu", torch.bfloat16):
            kinds = [
                [state.dtype for state in one(**INPUTS, output_hidden_states=True).hidden_states]
                for one in (dense, plain, ours)
            ]
        assert kinds[1] == kinds[0]
        assert kinds[2] == kinds[0]
