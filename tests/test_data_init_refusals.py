"""convert(init="data"): what it refuses, and layers it never meets."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMultipleChoice, T5Config, T5Model

import kronbert
from kronbert import PlanError
from tests.calibration import LOW_RANK, classifier, sentences


def test_a_layer_that_is_never_met_says_so():
    model, text = wayward(), [torch.randn(99, 24)]
    student = kronbert.convert(model, rules=LINEAR, init="data", calibration=text)
    fits = student.data_fit.layers
    assert fits["one"].data_error < fits["one"].weights_error
    assert (fits["other"].data_error, fits["other"].weights_error) == (None, None)
    assert "never reaches" in fits["other"].kept
    assert "never reaches" in str(student.data_fit)
    assert torch.equal(student.other.a, kronbert.convert(model, rules=LINEAR).other.a)


def poisoned():
    model = classifier()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.bias[3] = torch.nan
    return model


def wayward():
    class Wayward(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(24, 20), nn.Linear(24, 20)

        def forward(self, x):
            return self.one(x) if len(x) > 5 else self.other(x)

    return Wayward()


def replaced():
    model = wayward()
    model.forward = model.forward
    return model


LINEAR = {"re:.*": {"rank": 3}}
REFUSED = {
    "no text": (classifier, LOW_RANK, {"init": "data"}, "calibration=NoneType.*a DataLoader"),
    "a lone dict": (
        classifier,
        LOW_RANK,
        {"init": "data", "calibration": {"input_ids": 1}},
        "calibration=dict.*iterable of batches",
    ),
    "nothing": (classifier, LOW_RANK, {"init": "data", "calibration": []}, "no batch has a token"),
    "only padding": (
        classifier,
        LOW_RANK,
        {
            "init": "data",
            "calibration": [
                {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3)}
            ],
        },
        "no batch has a token that counts",
    ),
    "lists": (
        classifier,
        LOW_RANK,
        {"init": "data", "calibration": [{"input_ids": [[2, 3]]}]},
        "return_tensors='pt'",
    ),
    "text unasked": (classifier, LOW_RANK, {"calibration": []}, "init='weights' reads no text"),
    "another init": (classifier, LOW_RANK, {"init": "svd"}, "expected 'weights' or 'data'"),
    "a list of lists": (
        classifier,
        LOW_RANK,
        {"init": "data", "calibration": [[1, 2]]},
        "batch 0 is a list",
    ),
    "a mask of scores": (
        classifier,
        LOW_RANK,
        {
            "init": "data",
            "calibration": [
                {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 1, 3, 3)}
            ],
        },
        r"batch 0 has an attention_mask of shape \(1, 1, 3, 3\)",
    ),
    "NaN": (
        poisoned,
        LOW_RANK,
        {"init": "data", "calibration": sentences(2)},
        "layer.0.attention.self.query'.*hold NaN or infinity",
    ),
    "two ways": (
        wayward,
        LINEAR,
        {"init": "data", "calibration": [torch.randn(9, 24), torch.randn(2, 24)]},
        "batch 1 meets 'other' where the first one meets 'one'",
    ),
    "a forward of its own": (
        replaced,
        LINEAR,
        {"init": "data", "calibration": [torch.randn(9, 24)]},
        "'': its forward is replaced, and a student's would call the teacher's",
    ),
    "too narrow": (
        wayward,
        LINEAR,
        {"init": "data", "calibration": [torch.randn(9, 23)]},
        "mat1 and mat2",
    ),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize(("make", "rules", "asked", "said"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_changes_nothing(make, rules, asked, said, inplace):
    model = make().train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    error = RuntimeError if said.startswith("mat1") else PlanError
    with pytest.raises(error, match=said):
        kronbert.convert(model, rules=rules, inplace=inplace, **asked)
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


def translator():
    config = T5Config(
        vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4, pad_token_id=0
    )
    return T5Model(config)


@pytest.mark.parametrize("padded", [None, "attention_mask", "decoder_attention_mask"])
def test_padding_on_either_side_of_an_encoder_decoder(padded):
    ids = torch.randint(2, 50, (8, 9))
    masks = {name: torch.ones_like(ids) for name in ("attention_mask", "decoder_attention_mask")}
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(0), **masks}
    model, rules = translator(), {"re:.*[.](q|k|v|o|wi|wo)": {"rank": 3}}
    if padded is None:
        fits = kronbert.convert(model, rules=rules, init="data", calibration=[batch]).data_fit
        assert all(fit.data_error < fit.weights_error for fit in fits.layers.values())
        return
    masks[padded][1, 6:] = 0
    with pytest.raises(PlanError, match=rf"batch 0 of an encoder-decoder is padded \(its {padded}"):
        kronbert.convert(model, rules=rules, init="data", calibration=[{**batch, **masks}])


def test_masks_of_several_choices():
    config = BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = BertForMultipleChoice(config)
    ids, mask = torch.randint(60, (6, 3, 10)), torch.ones(6, 3, 10)
    mask[:, 1, 4:] = 0
    rules = {"re:.*(query|output.dense)": {"rank": 3}}
    batches = [{"input_ids": ids, "attention_mask": mask}]
    fitted = kronbert.convert(model, rules=rules, init="data", calibration=batches)
    assert fitted.data_fit.tokens == mask.sum()
    batches[0]["input_ids"] = ids.masked_fill(mask == 0, 7)
    again = kronbert.convert(model, rules=rules, init="data", calibration=batches)
    for name, value in fitted.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], msg=name)
