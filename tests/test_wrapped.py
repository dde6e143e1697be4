"""Models of transformers inside another module: converted, saved, loaded and merged there."""

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    EncoderDecoderModel,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5Model,
)

import kronbert
from kronbert.errors import PlanError
from tests.small_berts import IDS, SMALL, classifier


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.out = BertModel(BertConfig(**SMALL)), nn.Linear(48, 48)


def loaded(folder):
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


def test_an_inner_model_saves_its_own_layers(tmp_path):
    model = Wrapper().eval()
    student = kronbert.convert(model, factor=3, keep=())
    assert not hasattr(model.encoder.config, "quantization_config")
    student.encoder.save_pretrained(tmp_path / "student")
    again = loaded(tmp_path / "student")
    assert torch.equal(again(IDS).last_hidden_state, student.encoder(IDS).last_hidden_state)
    assert again.kronecker_plan.dense_parameters == model.encoder.num_parameters()
    assert isinstance(student.out, kronbert.KroneckerLinear)
    merged = kronbert.merge(student)
    merged.encoder.save_pretrained(tmp_path / "dense")
    dense = loaded(tmp_path / "dense")
    assert not hasattr(dense, "kronecker_plan")
    torch.testing.assert_close(
        dense(IDS).last_hidden_state, again(IDS).last_hidden_state, atol=1e-5, rtol=1e-4
    )


def test_a_wrapper_changes_no_plan():
    """Its numbers are no layer's: the pooler stays "other", which presets leave dense."""
    model = classifier()
    plain, wrapped = (
        kronbert.plan(one, preset="k21", errors=False)
        for one in (model, torch.nn.Sequential(model))
    )
    assert [(one.size.group, one.groups) for one in wrapped.layers] == [
        (one.size.group, one.groups) for one in plain.layers
    ]
    assert wrapped.linear_flops() == plain.linear_flops()
    student = kronbert.convert(torch.nn.Sequential(model), preset="k21")
    assert kronbert.report(student, latency=False).student.linear_flops == plain.linear_flops()


def test_a_sentence_transformer_is_saved_by_itself(tiny_bert, tmp_path):
    kind = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = kind(str(tiny_bert), device="cpu")
    student = kronbert.convert(model, rules={"re:.*dense": {"rank": 2}})
    student.save_pretrained(str(tmp_path / "student"))
    again = kind(str(tmp_path / "student"), device="cpu")
    assert any(isinstance(m, kronbert.KroneckerLinear) for m in again.modules())
    texts = ["a good film", "a bad one"]
    assert (again.encode(texts) == student.encode(texts)).all()


def test_layers_beside_the_encoder_stay_dense(tiny_bert, tmp_path):
    """A SentenceTransformer's own: no config would hold their shapes."""
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    own = [parts.Pooling(32, pooling_mode="cls"), parts.Dense(32, 24), parts.Normalize()]
    model = SentenceTransformer(modules=[parts.Transformer(str(tiny_bert)), *own], device="cpu")
    (dense,) = (x for x in kronbert.plan(model, factor=3, errors=False).layers if not x.groups
                and x.size.name.startswith("2."))  # fmt: skip
    assert dense.size.group == "other"
    assert "outside the model of transformers" in dense.size.dense_because
    with pytest.raises(PlanError, match="outside the model of transformers"):
        kronbert.plan(model, rules={"2.linear": {"rank": 2}}, errors=False)
    student = kronbert.convert(model, factor=3)
    student.save_pretrained(str(tmp_path / "student"))
    again = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    texts = ["a good film", "a bad one"]
    assert (again.encode(texts) == student.encode(texts)).all()
    holder = torch.nn.ModuleDict({"encoder": model[0].model, "2": torch.nn.Linear(320, 320)})
    layers = {x.size.name: x for x in kronbert.plan(holder, factor=3, errors=False).layers}
    assert layers["2"].groups  # a module that its user saves
    assert layers["2"].size.group == "other"


def test_a_part_with_a_config_of_its_own_is_saved_alone(tmp_path):
    sizes = BertConfig(**SMALL)
    decoder = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    both = EncoderDecoderModel(encoder=BertModel(sizes), decoder=decoder).eval()
    student = kronbert.convert(both, factor=3)
    student.save_pretrained(tmp_path / "both")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "both").eval()
    found = [one(input_ids=IDS, decoder_input_ids=IDS).logits for one in (student, again)]
    assert torch.equal(*found)
    student.encoder.save_pretrained(tmp_path / "part")
    part = loaded(tmp_path / "part")
    assert torch.equal(part(IDS).last_hidden_state, student.encoder(IDS).last_hidden_state)
    assert any(isinstance(module, kronbert.KroneckerLinear) for module in part.modules())
    kronbert.merge(student).encoder.save_pretrained(tmp_path / "dense")
    assert not hasattr(loaded(tmp_path / "dense"), "kronecker_plan")


def test_a_sentence_transformer_is_fitted_to_data_and_measured(tiny_bert):
    """As the model inside is: it takes its batch as one argument."""
    kind = pytest.importorskip("sentence_transformers").SentenceTransformer
    model = kind(str(tiny_bert), device="cpu")
    inner = model[0].model
    texts = ["a good film, well made and acted", "a bad one", "the soup was cold"] * 9
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    given = set(batch)
    how = {"rules": {"re:.*dense": {"rank": 2}}, "init": "data", "calibration": [batch]}
    student, alone = (kronbert.convert(one, **how) for one in (model, inner))
    assert set(batch) == given
    found, expected = (one(**batch).last_hidden_state for one in (student[0].model, alone))
    torch.testing.assert_close(found, expected)
    assert student.data_fit.tokens == alone.data_fit.tokens
    made = kronbert.report(student, model, seconds=0.01, batch_sizes=(2,), sequence_length=16)
    assert made.inputs == "input_ids (batch, 16), attention_mask (batch, 16)"
    assert made.latency_ratio[2] > 0
    plain = kronbert.report(alone, inner, latency=False)
    assert made.student.parameters == plain.student.parameters


def test_two_models_made_with_one_config_keep_plans_of_their_own(tmp_path):
    config = BertConfig(**SMALL)
    pair = nn.ModuleDict({name: BertModel(config) for name in ("query", "text")}).eval()
    rules = {"re:.*self.query": {"rank": 2}, "re:text.*self.key": {"rank": 3}}
    for inplace in (False, True):
        student = kronbert.convert(pair, rules=rules, inplace=inplace).eval()
        for name, part in student.items():
            part.save_pretrained(tmp_path / name)
            again = loaded(tmp_path / name)
            assert torch.equal(again(IDS).last_hidden_state, part(IDS).last_hidden_state)
    for name, part in kronbert.merge(student).items():
        assert not hasattr(part.config, "quantization_config"), name


def test_another_model_of_the_same_config_stays_dense(tmp_path):
    """T5's sides have configs of their own, its whole has the one it was made with."""
    config = T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4)
    first, second = T5Model(config), T5Model(config)
    kronbert.convert(first, rules={"re:.*SelfAttention.(q|k)": {"rank": 2}}, inplace=True)
    assert first.config is not second.config
    assert first.encoder.config is not first.config
    second.save_pretrained(tmp_path)
    again = T5Model.from_pretrained(tmp_path)
    assert again.num_parameters() == second.num_parameters()


@pytest.mark.parametrize("kind", ["marian", "deberta"])
def test_instances_with_ties_of_their_own_merge(kind, tmp_path):
    if kind == "marian":
        config = MarianConfig(
            vocab_size=150, decoder_vocab_size=150, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, pad_token_id=0, max_position_embeddings=16,
        )  # fmt: skip
        model = MarianMTModel(config)
    else:
        config = DebertaV2Config(
            vocab_size=150, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, legacy=False,
        )  # fmt: skip
        model = DebertaV2ForMaskedLM(config)
    merged = kronbert.merge(kronbert.convert(model, factor=1.5))
    assert merged.all_tied_weights_keys == model.all_tied_weights_keys
    model.save_pretrained(tmp_path / "dense")
    try:
        type(model).from_pretrained(tmp_path / "dense")
    except AttributeError:  # up to transformers 5.17: DeBERTa's new head
        pytest.skip("transformers of this version does not load the dense model")
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, value in merged.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Pair(nn.Module):
    """Two encoders with one table and one first layer."""

    def __init__(self):
        super().__init__()
        self.query, self.document = (BertModel(BertConfig(**SMALL)) for _ in range(2))
        self.document.embeddings = self.query.embeddings
        self.document.encoder.layer[0] = self.query.encoder.layer[0]


def test_parts_that_share_modules_are_saved_with_all_of_their_own(tmp_path):
    student = kronbert.convert(Pair().eval(), factor=2)
    assert student.document.encoder.layer[0] is student.query.encoder.layer[0]
    for name in ("query", "document"):
        part = getattr(student, name)
        part.save_pretrained(tmp_path / name)
        again = loaded(tmp_path / name)
        assert torch.equal(again(IDS).last_hidden_state, part(IDS).last_hidden_state)


class Published(Wrapper, PyTorchModelHubMixin):
    pass


def test_a_model_whose_loading_would_leave_layers_random_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="Published.from_pretrained .* leave them random"):
        student = kronbert.convert(Published(), factor=2).eval()
    kronbert.merge(student).save_pretrained(tmp_path)
    again = Published.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        again.encoder(IDS).last_hidden_state, student.encoder(IDS).last_hidden_state
    )


def test_a_parametrised_layer_may_be_kept():
    model = Wrapper()
    parametrizations.weight_norm(model.out)
    with pytest.raises(PlanError, match="'out': its weight is parametrised"):
        kronbert.convert(model, factor=2)
    for said in ({"keep": ["out"]}, {"rules": {"out": "dense"}}):
        student = kronbert.convert(model, factor=2, **said)
        torch.testing.assert_close(student.out.weight, model.out.weight)
    with pytest.raises(PlanError, match="'out' cannot be converted: its weight is parametrised"):
        kronbert.convert(model, rules={"out": {"rank": 2}})


@pytest.mark.parametrize("reload", [False, True])
def test_a_merged_model_is_not_drawn_anew_inside_another(reload, tmp_path):
    """`EncoderDecoderModel` draws what nothing says is no draw any more."""
    student = kronbert.convert(BertModel(BertConfig(**SMALL)).eval(), factor=2)
    if reload:
        student.save_pretrained(tmp_path)
        student = loaded(tmp_path)
    decoder = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    for model in (student, kronbert.fuse(student), kronbert.merge(student)):
        expected = model(IDS).last_hidden_state
        pair = EncoderDecoderModel(encoder=model, decoder=decoder).eval()
        assert torch.equal(pair.encoder(IDS).last_hidden_state, expected)
