"""plan, convert, merge: nothing half done, ties kept, flags kept."""

import copy
import hashlib
import pickle

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM

import kronbert
from kronbert import KroneckerEmbedding, KroneckerLinear, KroneckerLMHead, NoMatchError, PlanError
from tests.small_berts import IDS, QUERY, classifier, masked_lm

TABLE = "bert.embeddings.word_embeddings"


def snapshot(model):
    """All that a conversion could touch: types, bits, flags, identity of parameters, config."""
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    modules = [(n, type(m), m.training) for n, m in model.named_modules(remove_duplicate=False)]
    parameters = [
        (n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)
    ]
    settings = repr(model.config) if hasattr(model, "config") else ""
    tied = repr(getattr(model, "all_tied_weights_keys", None))
    attributes = sorted(vars(model))
    return state.hexdigest(), modules, parameters, settings, tied, attributes


def poison_last(model):
    last = [m for m in model.modules() if type(m) is nn.Linear and m.out_features > 2][-1]
    with torch.no_grad():
        last.weight[-1, -1] = torch.nan


FAILURES = {
    "NaN in the last layer": (poison_last, {"factor": 4}, PlanError, "holds NaN or infinity"),
    "a rule for nothing": (
        None,
        {"rules": {"bert.encoder.layer.0.attention.self.qeury": "dense"}},
        NoMatchError,
        r"matches no Linear.*Nearest: 'bert.encoder.layer.0.attention.self.query'",
    ),
    "a shape that does not divide": (
        None,
        {"rules": {"re:.*query": "5x6*8x8"}},
        kronbert.ShapeError,
        rf"'{QUERY}'.*a_out=5 does not divide",
    ),
    "out of reach": (None, {"factor": 10**6}, PlanError, "is out of reach.*Ask for at most"),
    "a factor of one": (None, {"factor": 1}, PlanError, "a number > 1"),
    "nothing asked": (None, {}, PlanError, "nothing to convert"),
    "two ways of asking": (None, {"factor": 4, "preset": "k8"}, PlanError, "expected one of them"),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize(("spoil", "asked", "error", "said"), FAILURES.values(), ids=FAILURES)
def test_a_failure_changes_nothing(spoil, asked, error, said, inplace):
    model = masked_lm()
    if spoil:
        spoil(model)
    before = snapshot(model)
    with pytest.raises(error, match=said):
        kronbert.convert(model, **asked, inplace=inplace)
    assert snapshot(model) == before


def test_a_failure_in_the_last_fit_changes_nothing(monkeypatch):
    """Whatever goes wrong while fitting (memory, say), nothing has been swapped yet."""
    model, fits = classifier(), []
    before = snapshot(model)
    count = len(kronbert.plan(model, 4, errors=False).converted)
    real = KroneckerLinear.from_linear.__func__

    def fail_last(cls, linear, groups):
        fits.append(linear)
        if len(fits) == count - 2:  # the two embeddings are fitted otherwise
            raise MemoryError
        return real(cls, linear, groups)

    monkeypatch.setattr(KroneckerLinear, "from_linear", classmethod(fail_last))
    with pytest.raises(MemoryError):
        kronbert.convert(model, 4, inplace=True)
    assert snapshot(model) == before


@pytest.mark.parametrize("factor", [2, 4])
def test_the_teacher_is_untouched_and_shares_nothing(factor):
    teacher = masked_lm()
    before = snapshot(teacher)
    student = kronbert.convert(teacher, factor)
    assert snapshot(teacher) == before
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert not [n for n, p in student.named_parameters() if p.data_ptr() in theirs]
    assert student.config is not teacher.config
    assert student.bert.config is student.config
    assert getattr(teacher.config, "quantization_config", None) is None


def test_in_place_and_copy_give_the_same_student():
    teacher = masked_lm()
    ids = torch.randint(384, (2, 9))
    apart = kronbert.convert(copy.deepcopy(teacher), 4)
    norm = teacher.bert.embeddings.LayerNorm
    same = kronbert.convert(teacher, 4, inplace=True)
    assert same is teacher
    assert same.bert.embeddings.LayerNorm is norm
    assert torch.equal(same(ids).logits, apart(ids).logits)
    assert same.kronecker_plan == apart.kronecker_plan
    assert same.config.quantization_config.to_dict() == apart.config.quantization_config.to_dict()


def test_the_plan_of_a_student_says_its_errors():
    model = classifier()
    planned = kronbert.plan(model, 4)
    plan = kronbert.convert(model, plan=planned).kronecker_plan
    assert plan == planned
    assert all(0 < layer.error < 1 for layer in plan.converted)
    assert kronbert.plan(model.config, 4).parameters != 0


def copies():
    def saved(model, folder):
        model.save_pretrained(folder)
        return BertForMaskedLM.from_pretrained(folder)

    return {
        "itself": lambda model, _: model,
        "deepcopy": lambda model, _: copy.deepcopy(model),
        "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
        "save and load": saved,
        "tied again": lambda model, _: model.tie_weights() or model,
    }


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("way", copies())
def test_tied_weights_stay_tied(way, inplace, tmp_path):
    """Head to table, decoder's bias to predictions' bias, before and after a training step."""
    model = copies()[way](kronbert.convert(masked_lm(), 4, inplace=inplace), tmp_path)
    head, table = model.cls.predictions.decoder, model.get_submodule(TABLE)
    assert isinstance(head, KroneckerLMHead)
    assert isinstance(table, KroneckerEmbedding)
    assert sum(p.numel() for p in model.parameters()) == model.kronecker_plan.parameters
    ids = torch.randint(384, (2, 9))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = table.a.detach().clone()
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    assert not torch.equal(table.a, before)
    assert head.bias is model.cls.predictions.bias
    assert head.bias.any(), "the step reached the bias"
    h = torch.randn(3, 48)
    expected = h @ table.weight.T + model.cls.predictions.bias
    torch.testing.assert_close(head(h), expected)
    dense = kronbert.merge(model)
    assert dense.cls.predictions.decoder.weight is dense.get_submodule(TABLE).weight
    assert dense.cls.predictions.decoder.bias is dense.cls.predictions.bias
    torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    dense.tie_weights()
    assert dense.cls.predictions.decoder.weight is dense.get_submodule(TABLE).weight


def test_a_table_that_stays_dense_keeps_its_dense_head():
    student = kronbert.convert(masked_lm(), rules={"re:.*query": {"rank": 2}})
    head = student.cls.predictions.decoder
    assert type(head) is nn.Linear
    assert head.weight is student.get_submodule(TABLE).weight


def test_an_untied_decoder():
    student = kronbert.convert(masked_lm(tie_word_embeddings=False), 4)
    head = student.cls.predictions.decoder
    assert isinstance(head, KroneckerLinear)
    assert kronbert.merge(student).cls.predictions.decoder.weight.shape == (384, 48)


def test_converting_twice_is_refused():
    student = kronbert.convert(classifier(), 4)
    before = snapshot(student)
    for call in (kronbert.convert, kronbert.plan):
        with pytest.raises(PlanError, match=r"already a KroneckerEmbedding.*merge\(model\) first"):
            call(student, 2)
    assert snapshot(student) == before
    again = kronbert.convert(kronbert.merge(student), plan=student.kronecker_plan)
    ids = torch.randint(384, (2, 9))
    torch.testing.assert_close(again(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["bert-base-uncased", {"a": torch.ones(1)}, BertForMaskedLM])
def test_what_is_no_model_is_named(given):
    def convert(model):
        return kronbert.convert(model, factor=4)

    for call in (convert, kronbert.merge, kronbert.fuse, kronbert.unfuse):
        expected = rf"^{call.__name__}: expected a model \(nn.Module\), got .*from_pretrained"
        with pytest.raises(PlanError, match=expected):
            call(given)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_single_linear(inplace):
    dense = nn.Linear(24, 20)
    student = kronbert.convert(dense, rules={"": "4x6*5x4"}, inplace=inplace)
    assert isinstance(student, KroneckerLinear)
    assert (student.bias is dense.bias) == inplace
    back = kronbert.merge(student)
    assert type(back) is nn.Linear
    x = torch.randn(3, 24)
    torch.testing.assert_close(back(x), student(x))


def test_a_model_that_transformers_does_not_know():
    model = nn.Sequential(
        nn.Embedding(200, 24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24, bias=False)
    )
    student = kronbert.convert(model, 3)
    ids = torch.randint(200, (2, 5))
    assert student(ids).shape == (2, 5, 24)
    assert sum(p.numel() for p in student.parameters()) == student.kronecker_plan.parameters
    dense = kronbert.merge(student)
    torch.testing.assert_close(dense(ids), student(ids))
    assert not hasattr(dense, "kronecker_plan")
    student.load_state_dict(copy.deepcopy(student).state_dict())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("nested", [True, False], ids=["nested tensor", "plain"])
def test_torch_transformer_encoder(nested):
    """In eval mode torch reads ``linear1.weight`` past the module; the results must agree."""
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    rules = {"re:.*linear1": "4:3x24*16x1", "re:.*linear2": {"factor": 3}}
    student = kronbert.convert(model, rules=rules)
    assert type(student.layers[0].self_attn.out_proj) is type(layer.self_attn.out_proj)
    x = torch.randn(2, 7, 24)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    slow = student.train()(x, src_key_padding_mask=mask)
    slow.sum().backward()
    with torch.no_grad():
        fast = student.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fast[~mask], slow[~mask])


def test_a_module_in_two_places():
    shared = nn.Linear(24, 24)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    for inplace in (False, True):
        student = kronbert.convert(model, rules={"a": {"rank": 2}}, inplace=inplace)
        assert isinstance(student["a"], KroneckerLinear)
        assert student["b"][0] is student["a"]
        merged = kronbert.merge(student)
        assert merged["b"][0] is merged["a"]


def test_flags_and_modes_are_kept():
    model = classifier().train()
    model.bert.encoder.layer[1].eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.0" not in name)
    model.get_submodule(QUERY).bias.requires_grad_(True)
    student = kronbert.convert(model, 4)
    query = student.get_submodule(QUERY)
    assert [n for n, p in query.named_parameters() if p.requires_grad] == ["bias"]
    later = student.get_submodule(QUERY.replace("layer.0", "layer.1"))
    assert all(p.requires_grad for p in later.parameters())
    merged = kronbert.merge(student)
    for converted in (student, merged):
        assert {n: m.training for n, m in converted.named_modules()} == {
            n: m.training for n, m in model.named_modules()
        }
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_a_head_keeps_its_mode():
    model = masked_lm()
    model.cls.predictions.decoder.train()
    student = kronbert.convert(model, 4)
    assert {n: m.training for n, m in student.named_modules()} == {
        n: m.training for n, m in model.named_modules()
    }
    model.cls.predictions.decoder.eval()
    assert not kronbert.convert(model, 4).cls.predictions.decoder.training


def test_convert_and_merge_take_no_random_numbers():
    model = masked_lm()
    state = torch.get_rng_state()
    kronbert.merge(kronbert.convert(model, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_merge_leaves_the_student_alone():
    student = kronbert.convert(masked_lm(), 4)
    before = snapshot(student)
    kronbert.merge(student)
    assert snapshot(student) == before


@pytest.mark.parametrize("data", [False, True], ids=["weights", "data"])
def test_a_model_that_was_trained_with_gradient_checkpointing(data):
    """transformers leaves a hook on the word table, which its new table has as well."""
    model = masked_lm()
    model.enable_input_require_grads()
    more = {"init": "data", "calibration": [IDS]} if data else {}
    student = kronbert.convert(model, factor=3, **more)
    table = student.get_input_embeddings()
    assert isinstance(table, KroneckerEmbedding)
    table.requires_grad_(False)
    assert table(IDS).requires_grad
    student.disable_input_require_grads()
    assert not table(IDS).requires_grad
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    student.enable_input_require_grads()
    dense = kronbert.merge(student).get_input_embeddings().requires_grad_(False)
    assert dense(IDS).requires_grad
    plain = kronbert.merge(kronbert.convert(masked_lm(), factor=3)).get_input_embeddings()
    assert not plain.requires_grad_(False)(IDS).requires_grad


def test_a_default_device_other_than_the_models():
    model = masked_lm()
    torch.set_default_device("meta")
    try:
        student = kronbert.convert(model, factor=3, init="data", calibration=[IDS])
        report = kronbert.report(student, model, sequence_length=8, seconds=0.01)
        dense = kronbert.merge(student)
    finally:
        torch.set_default_device(None)  # "cpu" would leave a mode that Dynamo cannot trace
    assert report.latency_ratio
    wanted = kronbert.convert(model, factor=3, init="data", calibration=[IDS])
    assert torch.equal(student(IDS).logits, wanted(IDS).logits)
    torch.testing.assert_close(dense(IDS).logits, student(IDS).logits)
