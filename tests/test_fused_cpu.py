"""Fused encoders on the CPU's row kernels: the same numbers as transformers' own blocks."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kronbert
from kronbert import native
from kronbert.fused_parts import is_plain_sdpa
from kronbert.fusion import fuse

pytestmark = pytest.mark.usefixtures("nothing_kept")
KERNELS = native.library() is not None
VOCAB, LONGEST = 96, 48
# Hidden layers twice as wide, in slices that both maps of the half share.
RULES = {
    48: {"attention": "6x6*8x8", "up": "6x3*16x16", "down": "3x6*16x16"},
    96: {"attention": "48x48*2x2", "up": "6x3*32x32", "down": "3x6*32x32"},
}


def a_model(name: str, width: int, heads: int, **more: Any) -> Any:
    """A converted encoder of two layers, whose weights are not the initialisation's near-zeros."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": LONGEST}
    if name == "distilbert":
        config = transformers.DistilBertConfig(
            **sizes, dim=width, n_layers=2, n_heads=heads, hidden_dim=2 * width, **more
        )
    else:
        kind = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}[name]
        config = getattr(transformers, f"{kind}Config")(
            **sizes,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            intermediate_size=2 * width,
            **more,
        )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shapes = RULES[width]
    rules = {
        "re:.*(query|key|value|[qkv]_lin|attention.output.dense|out_lin)": shapes["attention"],
        "re:.*(intermediate.dense|lin1)": shapes["up"],
        r"re:.*(layer\.\d+\.output.dense|lin2)": shapes["down"],
    }
    return kronbert.convert(model, rules=rules).eval()


def inputs(tokens: int, padded: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCAB, (3, tokens))
    if not padded:
        return {"input_ids": ids}
    lengths = torch.tensor([tokens, (tokens + 1) // 2, 1])
    return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths[:, None]).long()}


def seen_rows(found: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Padding's own rows are nobody's: eager and fused attention may differ there."""
    mask = given.get("attention_mask")
    return found if mask is None else found[mask.bool()]


@torch.no_grad()
@pytest.mark.parametrize(("width", "heads"), [(48, 3), (96, 3)])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
def test_the_same_numbers(name, width, heads, kernels, ran):
    plain = a_model(name, width, heads)
    ours = fuse(copy.deepcopy(plain))
    exact = copy.deepcopy(plain).double()
    passes = 0
    for tokens, padded in ((1, True), (7, True), (16, True), (40, True), (12, False)):
        given = inputs(tokens, padded)
        expected = seen_rows(exact(**given).last_hidden_state, given)
        found = seen_rows(ours(**given).last_hidden_state, given)
        assert (found - expected).abs().max() <= 5e-5 * expected.abs().max()
        passes += 1
    expected_calls = {"attention": 2 * passes, "ffn_middle": 2 * passes}
    assert {kernel: ran[kernel] for kernel in expected_calls} == (
        expected_calls if kernels else dict.fromkeys(expected_calls, 0)
    )
    assert ran["add_norm"] >= 4 * passes if kernels else not ran


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_bfloat16(name, kernels, ran):
    """No further off than transformers' own blocks."""
    plain = a_model(name, 96, 3)
    exact = copy.deepcopy(plain).double()
    plain = plain.bfloat16()
    ours = fuse(copy.deepcopy(plain))
    exact.load_state_dict({k: v.double() for k, v in plain.state_dict().items()})
    for tokens in (1, 9, 40):
        given = inputs(tokens)
        expected = seen_rows(exact(**given).last_hidden_state, given)
        errors = [
            (seen_rows(m(**given).last_hidden_state, given) - expected).square().mean().sqrt()
            for m in (ours, plain)
        ]
        assert errors[0] <= 2 * errors[1]
    assert ran["ffn_middle"] == (6 if kernels else 0)
    assert ran["attention"] == (4 if kernels else 0)  # up to 32 tokens


@torch.no_grad()
def test_masks_of_more_dimensions(kernels, ran):
    """3-D: which token each token sees. 4-D: the same with one head for all."""
    plain = a_model("bert", 48, 3)
    ours, ids = fuse(copy.deepcopy(plain)), inputs(9)["input_ids"]
    sees = torch.rand(3, 9, 9) > 0.4
    sees |= torch.eye(9, dtype=torch.bool)
    for mask in (sees[:, None], torch.zeros(3, 1, 9, 9).masked_fill(~sees[:, None], -1e30)):
        found = ours(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        other = ours(input_ids=ids).last_hidden_state
        assert not torch.allclose(found, other, atol=1e-2)
    assert ran["attention"] == (8 if kernels else 0)


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 9])
def test_a_mask_written_by_numpy_is_read_anew(queries, kernels, ran):
    """Such a write is none that torch counts."""
    plain = a_model("bert", 48, 3)
    ours, ids = fuse(copy.deepcopy(plain)), inputs(9)["input_ids"]
    buffer = np.ones((3, 1, queries, 9), dtype=bool)
    mask = torch.from_numpy(buffer).expand(-1, -1, 9, -1)
    for seen in (9, 4, 6):
        buffer[...] = np.arange(9) < seen
        found = ours(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ran["attention"] == (6 if kernels else 0)


@torch.no_grad()
def test_a_mask_is_read_where_it_lies(kernels, ran):
    """Whatever device new tensors go to."""
    ours, given = fuse(a_model("bert", 48, 3)), inputs(9)
    expected = ours(**given).last_hidden_state
    mask = given["attention_mask"].bool()[:, None, None].expand(-1, -1, 9, -1).contiguous()
    with torch.device("meta"):
        found = ours(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
    torch.testing.assert_close(seen_rows(found, given), seen_rows(expected, given))
    assert ran["attention"] == (4 if kernels else 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "distilbert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_asked_for_beside(attention, name, kernels, ran):
    plain = a_model(name, 48, 3, attn_implementation=attention)
    ours, given = fuse(copy.deepcopy(plain)), inputs(9)
    more = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    found, expected = (model(**given, **more) for model in (ours, plain))
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(
            seen_rows(one, given), seen_rows(other, given), rtol=1e-4, atol=1e-4
        )
    assert len(found.hidden_states) == 3
    if attention == "eager":
        for one, other in zip(found.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
        assert len(found.attentions) == 2
    assert bool(ran["attention"]) == (kernels and attention == "sdpa")


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_an_attention_of_ones_own_is_called(name, kernels, ran):
    calls = []

    def own(module, query, key, value, mask, **more):
        calls.append(query.shape)
        y, weights = sdpa_attention_forward(module, query, key, value, mask, **more)
        return 2 * y, weights

    AttentionInterface.register("twice", own)
    AttentionMaskInterface.register("twice", sdpa_mask)
    plain = a_model(name, 48, 3)
    given, usual = inputs(9), fuse(copy.deepcopy(plain))
    before = usual(**given).last_hidden_state
    plain.set_attn_implementation("twice")
    ours = fuse(copy.deepcopy(plain))
    found, expected = ours(**given).last_hidden_state, plain(**given).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    assert calls == [(3, 3, 9, 16)] * 4
    assert ran["attention"] == (2 if kernels else 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["is_causal", "position_bias"])
def test_arguments_that_change_attention_go_the_plain_way(name, kernels, ran):
    more = {name: True if name == "is_causal" else torch.randn(1, 3, 9, 9)}
    plain = a_model("bert", 48, 3)
    ours, x = fuse(copy.deepcopy(plain)), torch.randn(2, 9, 48)
    found, expected = (m.encoder.layer[0].attention.self(x, None, **more)[0] for m in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not ran["attention"]
    usual = ours.encoder.layer[0].attention.self(x, None)[0]
    assert ran["attention"] == int(kernels)
    torch.testing.assert_close(usual, plain.encoder.layer[0].attention.self(x, None)[0])


def test_what_plain_attention_is():
    module = nn.Module()
    module.is_causal = False
    assert is_plain_sdpa(module, sdpa_attention_forward, {"output_attentions": False})
    assert not is_plain_sdpa(module, lambda *args: None, {})
    assert not is_plain_sdpa(nn.Module(), sdpa_attention_forward, {})
    for name in ("is_causal", "position_bias", "cache", "softcap"):
        assert not is_plain_sdpa(module, sdpa_attention_forward, {name: None})
    module.is_causal = True
    assert not is_plain_sdpa(module, sdpa_attention_forward, {})


@pytest.mark.parametrize("name", ["bert", "electra", "distilbert"])
def test_training_then_evaluation(name, kernels):
    """What was kept before a step is not what runs after it."""
    plain = a_model(name, 48, 3)
    ours, given = fuse(copy.deepcopy(plain)), inputs(9)
    for _ in range(2):
        outputs = []
        for model in (ours, plain):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            with torch.no_grad():
                model(**given)
            y = model(**given).last_hidden_state
            seen_rows(y, given).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                outputs.append(seen_rows(model(**given).last_hidden_state, given))
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(outputs[0], seen_rows(y.detach(), given), atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_no_number_stays_no_number(training):
    """What diverged shows, in scores too: NaN is no key that is masked."""
    student = a_model("bert", 48, 3, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    with torch.no_grad():
        next(student.encoder.layer[1].attention.self.query.parameters()).fill_(torch.nan)
    ids = torch.arange(24).reshape(2, 12)
    fuse(student.train(training))
    with torch.set_grad_enabled(training):
        assert student(ids)[0].isnan().all()
