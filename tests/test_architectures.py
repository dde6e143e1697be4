"""Every supported architecture from a small random config: convert, train, save, load, merge."""

import hashlib
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import kronbert
from kronbert import KroneckerEmbedding, KroneckerLinear, KroneckerLMHead

# Widths that divide well, all different: a swapped axis cannot hide.
SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 144,
}


class Case(NamedTuple):
    """auto: the Auto class that loads it. target: what the labels are."""

    model_class: str
    config: dict[str, Any]
    auto: str
    target: str
    factor: float = 3.0


def bert(model_class: str, auto: str, target: str, **more: Any) -> Case:
    return Case(model_class, {**SMALL, **more}, auto, target)


CASES = [
    bert("BertForSequenceClassification", "SequenceClassification", "class"),
    bert("BertForTokenClassification", "TokenClassification", "token"),
    bert("BertForQuestionAnswering", "QuestionAnswering", "span"),
    bert("BertForMaskedLM", "MaskedLM", "lm"),
    bert("RobertaForSequenceClassification", "SequenceClassification", "class"),
    bert("RobertaForMaskedLM", "MaskedLM", "lm"),
    bert("ElectraForSequenceClassification", "SequenceClassification", "class", embedding_size=24),
    bert("ElectraForMaskedLM", "MaskedLM", "lm", embedding_size=24),
    *(
        Case(
            f"DistilBertFor{auto}",
            {
                "vocab_size": 384,
                "dim": 48,
                "n_layers": 2,
                "n_heads": 4,
                "hidden_dim": 96,
                "max_position_embeddings": 144,
            },
            auto,
            target,
        )
        for auto, target in (("SequenceClassification", "class"), ("MaskedLM", "lm"))
    ),
    *(
        bert(
            "DebertaV2ForSequenceClassification",
            "SequenceClassification",
            "class",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            share_att_key=share,
            norm_rel_ebd="layer_norm",
            position_buckets=16,
        )
        for share in (True, False)
    ),
    bert(
        "DebertaV2ForMaskedLM",
        "MaskedLM",
        "lm",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
    ),
    *(
        bert(
            f"ModernBertFor{auto}",
            auto,
            target,
            pad_token_id=0,
            cls_token_id=1,
            bos_token_id=1,
            sep_token_id=2,
            eos_token_id=2,
            local_attention=8,
        )
        for auto, target in (("SequenceClassification", "class"), ("MaskedLM", "lm"))
    ),
    *(
        bert(
            f"MobileBertFor{auto}",
            auto,
            target,
            embedding_size=24,
            intra_bottleneck_size=32,
            true_hidden_size=32,
            num_feedforward_networks=2,
        )._replace(factor=factor)
        for auto, target, factor in (
            ("SequenceClassification", "class", 2.0),
            ("MaskedLM", "lm", 1.5),
        )
    ),
    Case(
        "ViTForImageClassification",
        {
            **{
                k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")
            },
            "image_size": 24,
            "patch_size": 8,
        },
        "ImageClassification",
        "image",
    ),
    Case(
        "GPT2LMHeadModel",
        {
            "vocab_size": 384,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 144,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "CausalLM",
        "causal",
    ),
]


def label(case: Case) -> str:
    return case.model_class + ("-own-keys" if case.config.get("share_att_key") is False else "")


def build(case: Case) -> nn.Module:
    """The dense model, with weights that are not the initialisation's near-zeros."""
    model_class = getattr(transformers, case.model_class)
    config = model_class.config_class(**case.config)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(case: Case) -> dict[str, torch.Tensor]:
    """Two sequences of different lengths, or two images, with labels."""
    if case.target == "image":
        return {"pixel_values": torch.randn(2, 3, 24, 24), "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 384, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    ids[1, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if case.target == "class":
        return {**inputs, "labels": torch.tensor([0, 1])}
    if case.target == "token":
        return {**inputs, "labels": torch.randint(0, 2, ids.shape)}
    if case.target == "span":
        first, last = torch.tensor([1, 2]), torch.tensor([4, 6])
        return {**inputs, "start_positions": first, "end_positions": last}
    return {**inputs, "labels": ids}


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss and first scores, flat."""
    with torch.no_grad():
        out = model(**inputs)
    scores = out.start_logits if "start_logits" in out else out.logits
    return torch.cat([out.loss.reshape(1), scores.flatten()])


def digest(model: nn.Module) -> str:
    """A hash of every name and bit of the state."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Module name -> whether any of its own parameters has a gradient."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {
        name: all(p.grad is not None for p in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def products(plan: kronbert.Plan) -> kronbert.Plan:
    """``plan`` with a sum of Kronecker products in every layer that it converts."""
    shapes = {}
    for layer in plan.converted:
        size, b = layer.size, "8x4" if layer.size.kind == "linear" else "1x4"
        if not size.tied_to:
            shapes[size.name] = f"2:{size.out // int(b[0])}x{size.inner // 4}*{b}"
    return plan.edit(shapes)


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "products"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_architecture(case, planned, tmp_path):
    teacher = build(case)
    inputs = batch(case)
    before, settings = digest(teacher), teacher.config.to_dict()
    plan = kronbert.plan(teacher, factor=case.factor)
    assert case.factor <= plan.factor <= 1.06 * case.factor
    student = kronbert.convert(teacher, plan=plan if planned else products(plan))

    plan = student.kronecker_plan
    assert {shape.low_rank for x in plan.converted for shape in x.groups} == {planned}
    assert sum(p.numel() for p in student.parameters()) == plan.parameters
    assert digest(teacher) == before
    assert teacher.config.to_dict() == settings
    assert not student.training

    dense, ours = gradients(teacher, inputs), gradients(student, inputs)
    teacher.zero_grad()
    lost = [name for name, module in ours.items() if dense.get(name, True) and not module]
    assert not lost, f"no gradient: {lost}"

    found = outputs(student, inputs)
    student.save_pretrained(tmp_path)
    auto = getattr(transformers, f"AutoModelFor{case.auto}")
    loaded = auto.from_pretrained(tmp_path)
    assert digest(loaded) == digest(student)
    assert torch.equal(outputs(loaded, inputs), found)
    assert loaded.kronecker_plan.parameters == plan.parameters
    assert loaded.kronecker_plan.dense_parameters == plan.dense_parameters
    assert {x.size: x.groups for x in loaded.kronecker_plan.layers} == {
        x.size: x.groups for x in plan.layers
    }

    for converted in (student, loaded):
        merged = kronbert.merge(converted)
        kinds = {name: type(module) for name, module in merged.named_modules()}
        assert kinds == {name: type(module) for name, module in teacher.named_modules()}
        assert [(n, p.shape) for n, p in merged.named_parameters()] == [
            (n, p.shape) for n, p in teacher.named_parameters()
        ]
        torch.testing.assert_close(outputs(merged, inputs), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_rules_reach_every_architecture(case):
    """A pattern converts the layers it names and no others, and convert with full rank is exact."""
    teacher = build(case)
    wide = next(
        name
        for name, module in teacher.named_modules()
        if type(module) in (nn.Linear, Conv1D) and ".0." in name
    )
    pattern = "re:" + wide.replace(".0.", r".\d+.").replace(".", r"\.").replace(
        r"\.\d+\.", r"\.\d+\."
    )
    student = kronbert.convert(teacher, rules={pattern: {"rank": 96}})
    layers = [x.size.name for x in student.kronecker_plan.converted]
    assert wide in layers
    assert all(
        isinstance(module, KroneckerLinear) == (name in layers)
        for name, module in student.named_modules()
        if not isinstance(module, KroneckerEmbedding | KroneckerLMHead)
    )
    inputs = batch(case)
    torch.testing.assert_close(
        outputs(student, inputs), outputs(teacher, inputs), rtol=1e-4, atol=1e-5
    )


def passes_on(layer, args, kwargs, output):
    """A forward hook: the layer gives what it was given."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_fewer_layers_of_every_architecture(case, tmp_path):
    """The copy computes what the model does when the layers that were dropped do nothing."""
    kind = getattr(transformers, case.model_class).config_class.model_type
    depth = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(kind, "num_hidden_layers")
    case = case._replace(config={**case.config, depth: 4})
    model, inputs = build(case), batch(case)
    before = digest(model)
    shallow = kronbert.fewer_layers(model, (1, 4))
    found = outputs(shallow, inputs)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    hooks = [layers[i].register_forward_hook(passes_on, with_kwargs=True) for i in (1, 2)]
    assert torch.equal(outputs(model, inputs), found)
    for hook in hooks:
        hook.remove()
    assert digest(model) == before
    assert shallow.config.num_hidden_layers == 2
    shallow.save_pretrained(tmp_path)
    auto = getattr(transformers, f"AutoModelFor{case.auto}")
    assert torch.equal(outputs(auto.from_pretrained(tmp_path), inputs), found)
    student = kronbert.convert(shallow, factor=1.5)
    assert student.kronecker_plan.dense_parameters == shallow.num_parameters()


def test_gpt2_keeps_its_layer_types():
    """Conv1D stands transposed, and comes back from a merge of a loaded model."""
    (case,) = [case for case in CASES if case.model_class == "GPT2LMHeadModel"]
    student = kronbert.convert(build(case), factor=case.factor)
    attention = student.transformer.h[0].attn.c_attn
    assert isinstance(attention, KroneckerLinear)
    assert (attention.in_features, attention.out_features) == (48, 144)
    assert attention.conv1d
    assert isinstance(student.lm_head, KroneckerLMHead)
    assert isinstance(kronbert.merge(student).transformer.h[0].attn.c_attn, Conv1D)


def test_a_converted_gpt2_generates():
    (case,) = [case for case in CASES if case.model_class == "GPT2LMHeadModel"]
    student = kronbert.convert(build(case), factor=case.factor)
    ids = torch.randint(3, 384, (2, 5))
    found = student.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert found.shape[1] > 5
    with torch.no_grad():
        assert torch.equal(student(ids).logits[:, -1].argmax(-1), found[:, 5])
