"""convert and merge refuse weights they cannot read and plans of other models."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import kronbert
from kronbert import PlanError
from tests.small_berts import IDS, QUERY, SMALL, classifier, masked_lm


def on_meta(model):
    return model.to("meta")


def quantised(model):
    model.is_quantized, model.quantization_method = True, "awq"
    return model


def subclassed(model):
    class Sharded(torch.Tensor):
        pass

    query = model.get_submodule(QUERY)
    query.weight = nn.Parameter(query.weight.detach().as_subclass(Sharded))
    return model


def whole_numbers(model):
    query = model.get_submodule(QUERY)
    query.weight = nn.Parameter(query.weight.to(torch.int8), requires_grad=False)
    return model


def flattened(model):
    query = model.get_submodule(QUERY)
    query.weight = nn.Parameter(query.weight.flatten())
    return model


def hooked(model):
    model.get_submodule(QUERY).register_forward_hook(lambda *_: None)
    return model


def hooked_backward(model):
    model.get_submodule(QUERY).register_full_backward_hook(lambda *_: None)
    return model


def dispatched(model):
    """As accelerate does for several devices."""
    model.get_submodule(QUERY).forward = lambda x: x
    return model


def parametrised(model):
    parametrizations.weight_norm(model.get_submodule(QUERY))
    return model


def wrapped(model):
    return nn.DataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


REFUSED = {
    on_meta: "on the meta device, there is nothing to decompose",
    quantised: r"quantised \(awq\). Load it without",
    subclassed: "is a Sharded of torch.float32, sharded or quantised",
    whole_numbers: "of torch.int8, sharded or quantised",
    flattened: r"shape \(2304,\), expected two dimensions. Convert before sharding",
    hooked: r"carries hooks \(_forward_hooks\).*Remove them",
    hooked_backward: r"carries hooks \(_backward_hooks\)",
    dispatched: "its forward is replaced",
    parametrised: "is parametrised. Remove the parametrisation",
    wrapped: "wrapped in a DataParallel. Convert model.module",
    compiled: "wrapped in a OptimizedModule. Convert model._orig_mod",
}


@pytest.mark.parametrize(
    ("spoil", "said"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_weights_that_cannot_be_read(spoil, said):
    model = spoil(classifier())
    before = [type(module) for module in model.modules()]
    for inplace in (False, True):
        with pytest.raises(PlanError, match=said):
            kronbert.convert(model, 4, inplace=inplace)
    assert [type(module) for module in model.modules()] == before


def test_a_distributed_tensor_is_refused(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import DTensor, Replicate

    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(24, 24))
        local = DTensor.from_local(model[0].weight.detach(), mesh, [Replicate()])
        model[0].weight = nn.Parameter(local)
        with pytest.raises(PlanError, match=r"is a DTensor of torch.float32, sharded"):
            kronbert.convert(model, 2)
    finally:
        distributed.destroy_process_group()


def test_a_parametrised_layer_may_stay_dense():
    model = classifier()
    parametrizations.weight_norm(model.classifier)  # a head: on the default keep list
    student = kronbert.convert(model, 2)
    assert student.classifier.parametrizations


def test_a_plan_of_another_model_is_refused():
    model, plan = masked_lm(), kronbert.plan(classifier(), 4, errors=False)
    with pytest.raises(PlanError, match=r"the model has no such layer. Make the plan from this"):
        kronbert.convert(model, plan=plan)
    wide = kronbert.plan(BertConfig(**{**SMALL, "intermediate_size": 192}), 4)
    with pytest.raises(PlanError, match=r"expects a 192x48 weight, the model has a 96x48"):
        kronbert.convert(BertForMaskedLM(BertConfig(**SMALL)).bert, plan=wide)
    untied = kronbert.plan(masked_lm(tie_word_embeddings=False), 4, errors=False)
    with pytest.raises(PlanError, match=r"'cls.predictions.decoder'.*kind 'head' tied to"):
        kronbert.convert(model, plan=untied)
    with pytest.raises(PlanError, match="the plan fixes every shape; give it alone"):
        kronbert.convert(classifier(), 4, plan=plan)
    nothing = plan.edit({layer.size.name: "dense" for layer in plan.converted})
    with pytest.raises(PlanError, match="no layer of the plan would be converted"):
        kronbert.convert(model, plan=nothing)


def test_a_plan_made_from_a_config_counts_the_model_it_meets():
    """The config does not know the number of labels this head has."""
    model = classifier(num_labels=7)
    config = BertConfig(**SMALL, architectures=["BertForSequenceClassification"])
    plan = kronbert.plan(config, rules={"re:.*(query|dense)": {"factor": 4}}, keep=())
    plan = kronbert.planning.Plan.from_json(
        {**plan.to_json(), "layers": [x for x in plan.to_json()["layers"] if x["groups"]]}
    )
    student = kronbert.convert(model, plan=plan)
    assert student.kronecker_plan.parameters == sum(p.numel() for p in student.parameters())


def test_merge_refuses_what_it_cannot_merge():
    with pytest.raises(PlanError, match="holds no Kronecker layer"):
        kronbert.merge(classifier())
    student = kronbert.convert(masked_lm(), 4)
    with pytest.raises(PlanError, match="tied to an embedding outside the model"):
        kronbert.merge(student.cls)


WRONG = {
    "config of a model": ({"config": BertConfig()}, "config=BertConfig: expected a kronbert.Kron"),
    "config as a dict": ({"config": {"factor": 8}}, "config=dict: expected"),
    "plan's file": ({"plan": "plan.json"}, r"convert\(plan=str\): expected a kronbert.Plan"),
    "plan's json": ({"plan": {}}, r"convert\(plan=dict\): expected"),
    "keep": ({"factor": 3, "keep": 5}, "keep=.5.*: expected a list of patterns"),
}


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=list(WRONG))
def test_arguments_of_another_kind(given, said):
    with pytest.raises(PlanError, match=said):
        kronbert.convert(classifier(), **given)
    with pytest.raises(PlanError, match="keep=5: expected a list"):
        kronbert.KroneckerConfig(factor=3, keep=5)


def test_a_plan_without_the_row_of_a_tied_head():
    model = masked_lm()
    told = kronbert.plan(model, factor=3).to_json()
    told["layers"] = [row for row in told["layers"] if not row["tied_to"]]
    with pytest.raises(PlanError, match=r"decoder' shares its weight .* for both or neither"):
        kronbert.convert(model, plan=kronbert.Plan.from_json(told))


def test_a_students_config_is_not_planned_as_a_teachers(tmp_path):
    student = kronbert.convert(classifier(), 4)
    student.save_pretrained(tmp_path)
    for config in (student.config, AutoConfig.from_pretrained(tmp_path)):
        with pytest.raises(PlanError, match="the config is a student's, converted before"):
            kronbert.plan(config, factor=4)
    config = classifier().config
    expected = kronbert.plan(config, factor=4)
    config.quantization_config = BitsAndBytesConfig()  # another method's: planned by its sizes
    assert kronbert.plan(config, factor=4) == expected


def test_nothing_to_convert():
    with pytest.raises(PlanError, match="the model has no parameter"):
        kronbert.convert(nn.ReLU(), factor=4)


def test_a_weight_is_read_not_set():
    student = kronbert.convert(classifier(), 4)
    for layer in (student.bert.pooler.dense, student.bert.embeddings.word_embeddings):
        with pytest.raises(AttributeError, match=r"Kronecker\w+ has no weight of its own"):
            layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))


def test_layers_that_are_saved_as_parts_of_one():
    """Nomic's query, key and value: a student of theirs could not be loaded again."""
    known = transformers.CONFIG_MAPPING
    if "nomic_bert" not in known:
        pytest.skip("transformers of this version has no such model")
    model = transformers.AutoModel.from_config(known["nomic_bert"](**SMALL, pad_token_id=1)).eval()
    with pytest.raises(PlanError, match=r"q_proj': transformers saves .*keep=\['\*self_attn.q_pr"):
        kronbert.convert(model, factor=3)
    assert not any("Kronecker" in type(module).__name__ for module in model.modules())
    kept = ["*self_attn.q_proj", "*self_attn.k_proj", "*self_attn.v_proj"]
    student = kronbert.convert(model, factor=1.5, keep=kept)
    assert student.kronecker_plan.factor >= 1.5


def test_a_student_with_joined_layers_kept_dense_is_loaded_again(tmp_path):
    known = transformers.CONFIG_MAPPING
    if "nomic_bert" not in known:
        pytest.skip("transformers of this version has no such model")
    model = transformers.AutoModel.from_config(known["nomic_bert"](**SMALL, pad_token_id=1)).eval()
    kept = [f"*self_attn.{name}_proj" for name in "qkv"]
    student = kronbert.convert(model, factor=1.5, keep=kept).eval()
    student.save_pretrained(tmp_path)
    again = kronbert.load(tmp_path).eval()
    assert torch.equal(again(IDS).last_hidden_state, student(IDS).last_hidden_state)


def test_merge_would_lose_hooks():
    student = kronbert.convert(classifier(), factor=3)
    student.bert.pooler.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(PlanError, match=r"'bert.pooler.dense' carries hooks \(_forward_hooks\)"):
        kronbert.merge(student)


def test_a_config_that_another_model_has_too(tmp_path):
    config = classifier().config
    first, second = (type(classifier())(config) for _ in range(2))
    kronbert.convert(first, factor=3, inplace=True)
    assert first.config.quantization_config is not None
    assert first.bert.encoder.config is first.config
    second.save_pretrained(tmp_path)
    again = type(second).from_pretrained(tmp_path)
    assert again.num_parameters() == second.num_parameters()


def test_a_plan_with_other_rows_than_the_model():
    """What it has no row for stays dense, and counts; two rows for one layer are refused."""
    model = classifier()
    plan = kronbert.plan(model, factor=3)
    fewer = kronbert.plan(kronbert.fewer_layers(model, 1), factor=2)
    student = kronbert.convert(model, plan=fewer)
    made = student.kronecker_plan
    assert [layer.size.name for layer in made.layers] == [layer.size.name for layer in plan.layers]
    assert made.linear_flops() == kronbert.report(student, latency=False).student.linear_flops
    assert made.parameters == student.num_parameters()
    with pytest.raises(PlanError, match=r"the plan has two rows for it"):
        kronbert.convert(model, plan=replace(plan, layers=(*plan.layers, plan.layers[1])))


def test_what_is_kept_beside_the_head():
    """A pattern of one's own does not give the task's head away; an empty list does."""
    model = classifier()
    for keep in (None, ["bert.pooler*"], "bert.pooler*"):
        student = kronbert.convert(model, factor=3, keep=keep)
        assert type(student.classifier) is torch.nn.Linear
        kept = type(student.bert.pooler.dense) is torch.nn.Linear
        assert kept == (keep is not None)
    assert kronbert.plan(model, factor=3, keep=[]).config.keep == ()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
def test_quantised_layers_are_refused():
    model = torch.ao.quantization.quantize_dynamic(classifier(), {torch.nn.Linear})
    with pytest.raises(
        PlanError, match=r"query' is quantised \(Linear\). Convert the model before"
    ):
        kronbert.convert(model, factor=2)


def test_adapters_are_refused():
    """No student keeps them: `peft` writes them into weights that a product has not."""
    home = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = classifier()
    model.bert.pooler.dense = home(48, 48)
    with pytest.raises(PlanError, match=r"pooler.dense' is a Linear of PEFT.*merge_and_unload"):
        kronbert.convert(model, factor=2)


def test_the_head_of_a_wrapped_model_is_kept():
    config = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_labels=40, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    for one in (model, torch.nn.Sequential(model)):
        converted = kronbert.plan(one, factor=2, errors=False).converted
        assert not any(layer.size.name.endswith("score") for layer in converted)


@pytest.mark.parametrize("changes", [["bert.pooler.dense"], None])
def test_edit_wants_names_with_what_becomes_of_them(changes):
    plan = kronbert.plan(classifier(), factor=3)
    with pytest.raises(PlanError, match="expected names with what becomes of the layers"):
        plan.edit(changes)
