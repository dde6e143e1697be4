"""What a stage changes of its student while it trains: attention on a CPU, and dropout."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kronbert
from kronbert import native
from kronbert.distill import Objective, Stage, Term
from kronbert.distill.cpu_layers import fused_layers, plain_attention
from kronbert.distill.dropout import dropout_set_to
from kronbert.errors import DistillError

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT = transformers.BertConfig(**SIZES, intermediate_size=48)
MODERN = transformers.ModernBertConfig(
    **SIZES, intermediate_size=48, attention_dropout=0.2, pad_token_id=0
)
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 4,
    "attention_probs_dropout_prob": 0.3,
}


def model(config):
    return transformers.AutoModel.from_config(config, attn_implementation="sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's attention")
def test_attention_is_plain_within_and_the_same_after():
    torch.manual_seed(0)
    bert = model(BERT).eval()
    ids = torch.randint(0, 50, (3, 7))
    before = bert(ids).last_hidden_state
    with plain_attention(bert):
        assert bert.config._attn_implementation == "eager"
        within = bert(ids, output_attentions=True)
    assert within.attentions is not None  # SDPA gives none
    assert len(within.attentions) == 2
    torch.testing.assert_close(within.last_hidden_state, before)
    assert bert.config._attn_implementation == "sdpa"


def test_another_attention_is_left_alone():
    bert = transformers.AutoModel.from_config(BERT, attn_implementation="eager")
    with plain_attention(bert):
        assert bert.config._attn_implementation == "eager"
    assert bert.config._attn_implementation == "eager"
    with plain_attention(nn.Linear(2, 2)):
        pass


def test_attention_comes_back_after_an_error():
    bert = model(BERT)
    with pytest.raises(KeyError), plain_attention(bert):
        raise KeyError
    assert bert.config._attn_implementation == "sdpa"


SVD = {"re:.*(query|key|value|dense)": {"rank": 4}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's attention")
def test_a_fused_student_without_dropout_keeps_its_own_attention():
    student = kronbert.convert(model(BERT), rules=SVD, keep=())
    with dropout_set_to(student, 0.0), fused_layers(student, autocast=False):
        with plain_attention(student):
            assert student.config._attn_implementation == "sdpa"
        with plain_attention(student, autocast=True):  # our calls take float32 alone
            assert student.config._attn_implementation == "eager"
    with fused_layers(student, autocast=False), plain_attention(student):  # dropout of 0.1
        assert student.config._attn_implementation == "eager"
    with dropout_set_to(student, 0.0), plain_attention(student):  # not fused
        assert student.config._attn_implementation == "eager"
    modern = kronbert.fuse(kronbert.convert(model(MODERN), rules={"re:.*Wo": {"rank": 4}}, keep=()))
    with dropout_set_to(modern, 0.0), plain_attention(modern):  # its attention has no call of ours
        assert modern.config._attn_implementation == "eager"


@pytest.mark.skipif(native.library() is None, reason="no row kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's attention")
def test_training_takes_the_kernels_to_the_same_gradients(monkeypatch):
    """Padding and all, of a whole model."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{**SIZES, "hidden_size": 64}, intermediate_size=128, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    student = kronbert.convert(model(config), rules=SVD, keep=()).train()
    ids, mask = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 4:] = 0
    made, real = [], native.attention_backward
    monkeypatch.setattr(native, "attention_backward", lambda *a: made.append(1) or real(*a))

    def gradients():
        student.zero_grad()
        y = student(ids, attention_mask=mask).last_hidden_state
        (y * mask[..., None]).square().sum().backward()
        return {
            name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None
        }

    plain = gradients()
    assert not made
    with fused_layers(student, autocast=False), plain_attention(student):
        found = gradients()
    assert len(made) == config.num_hidden_layers
    assert found.keys() == plain.keys()
    off = 1e-5 * max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=off)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's layers")
def test_truncated_svds_are_fused_within():
    student = kronbert.convert(model(BERT), rules=SVD, keep=())
    with fused_layers(student, autocast=False):
        assert kronbert.fused(student) is not None
    assert kronbert.fused(student) is None
    with pytest.raises(KeyError), fused_layers(student, autocast=False):
        raise KeyError
    assert kronbert.fused(student) is None
    with fused_layers(student, autocast=True):
        assert kronbert.fused(student) is None
    kronbert.fuse(student)
    with fused_layers(student, autocast=False):
        pass
    assert kronbert.fused(student) is not None  # its owner's wish


@pytest.mark.parametrize("make", [
    lambda: model(BERT),
    lambda: kronbert.convert(model(BERT), rules={"re:.*n.output.dense": "12x12*2x2"}, keep=()),
    lambda: nn.Linear(2, 2),
], ids=["dense", "products", "no encoder"])  # fmt: skip
def test_what_is_not_fused(make):
    student = make()
    with fused_layers(student, autocast=False):
        assert kronbert.fused(student) is None


@pytest.mark.parametrize("config", [BERT, MODERN], ids=["bert", "modernbert"])
def test_without_dropout_training_mode_gives_evaluation_s_numbers(config):
    torch.manual_seed(0)
    student = model(config).train()
    ids = torch.randint(1, 50, (3, 7))
    dropped = student(ids).last_hidden_state
    with dropout_set_to(student, 0.0):
        plain = student(ids).last_hidden_state
    torch.testing.assert_close(plain, student.eval()(ids).last_hidden_state)
    torch.manual_seed(1)
    again = student.train()(ids).last_hidden_state
    torch.manual_seed(1)
    with dropout_set_to(student, None):
        same = student(ids).last_hidden_state
    assert torch.equal(again, same)
    assert not torch.allclose(dropped, plain)


@pytest.mark.parametrize(
    "config",
    [
        transformers.ViTConfig(**VISION, image_size=8),
        transformers.YolosConfig(**VISION, image_size=[8, 8], use_mid_position_embeddings=False),
    ],
    ids=["vit", "yolos"],
)
def test_attention_to_pictures_does_not_drop_either(config):
    student = transformers.AutoModel.from_config(config).train()
    pixels = torch.randn(2, 3, 8, 8)
    dropped = student(pixels).last_hidden_state
    with dropout_set_to(student, 0.0):
        plain = student(pixels).last_hidden_state
    torch.testing.assert_close(plain, student.eval()(pixels).last_hidden_state)
    assert not torch.allclose(dropped, plain)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BartConfig(
            vocab_size=50, d_model=24, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=32,
            decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.5,
            attention_dropout=0.5, activation_dropout=0.5, max_position_embeddings=16,
        ),
        transformers.LongformerConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, attention_window=4, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.5, max_position_embeddings=32,
        ),
        transformers.XLMConfig(
            vocab_size=50, emb_dim=24, n_layers=1, n_heads=2, dropout=0.5, attention_dropout=0.5,
            max_position_embeddings=32,
        ),
    ],
    ids=["bart", "longformer", "xlm"],
)  # fmt: skip
def test_probabilities_that_modules_keep_by_name(config):
    student, ids = transformers.AutoModel.from_config(config).train(), torch.randint(3, 50, (3, 8))
    dropped = student(ids).last_hidden_state
    with dropout_set_to(student, 0.0):
        plain = student(ids).last_hidden_state
    torch.testing.assert_close(plain, student.eval()(ids).last_hidden_state)
    assert not torch.allclose(dropped, plain)


@pytest.mark.parametrize("config", [BERT, MODERN], ids=["bert", "modernbert"])
def test_dropout_comes_back_after_an_error(config):
    student = model(config)

    def held():
        names = ("p", "attention_dropout", "dropout_prob")
        return [getattr(m, name) for m in student.modules() for name in names if hasattr(m, name)]

    before = held()
    with dropout_set_to(student, 0.75):
        assert set(held()) == {0.75}
    with pytest.raises(KeyError), dropout_set_to(student, 0.75):
        raise KeyError
    assert held() == before


def test_a_config_may_write_no_dropout_as_a_whole_number():
    student = model(BERT)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    ids = torch.randint(1, 50, (3, 7))
    student.train()
    plain = student(ids).last_hidden_state
    with dropout_set_to(student, 0.5):
        assert not torch.allclose(student(ids).last_hidden_state, plain)
    assert torch.equal(student(ids).last_hidden_state, plain)


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 1.5])
def test_a_stage_refuses_what_is_no_probability(wrong):
    objective = Objective(terms=(Term(tap="labels"),))
    with pytest.raises(DistillError, match=r"dropout=.*expected a probability in \[0, 1\)"):
        Stage(name="s", objective=objective, learning_rate=1e-3, epochs=1, dropout=wrong)
    stage = Stage(name="s", objective=objective, learning_rate=1e-3, epochs=1, dropout=0.0)
    assert Stage.from_json(stage.to_json()).dropout == 0.0
