"""convert(init="data"): order, padding, biases, ties, and less error on unseen text."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2Model,
)

import kronbert
from kronbert import calibration, data_init
from kronbert.moments import Moments, input_moments, pair_moments, token_rows
from kronbert.weighted_fit import nearest_rows
from tests.calibration import LOW_RANK, SMALL, classifier, sentences

KRONECKER = {
    "re:.*(query|key|value|attention.output.dense)": "4:2x16*24x3",
    r"re:.*\d.output.dense": "6:2x48*24x2",
    "re:.*inter.*dense": "24x2*4x24",
}


@torch.no_grad()
def hidden_error(student, teacher, batches):
    missed = whole = 0.0
    for batch in batches:
        kept = batch["attention_mask"].bool()
        wanted, found = (
            m(**batch, output_hidden_states=True).hidden_states[-1][kept]
            for m in (teacher, student)
        )
        missed += (wanted - found).square().sum().item()
        whole += (wanted - wanted.mean(0)).square().sum().item()
    return (missed / whole) ** 0.5


@pytest.mark.parametrize("rules", [LOW_RANK, KRONECKER], ids=["low rank", "kronecker"])
def test_unseen_text_is_met_better(rules):
    teacher = classifier()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    weights = kronbert.convert(teacher, rules=rules)
    data = kronbert.convert(teacher, rules=rules, init="data", calibration=sentences(12))
    held_out = sentences(6, seed=1)
    assert hidden_error(data, teacher, held_out) < 0.93 * hidden_error(weights, teacher, held_out)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert data.kronecker_plan == weights.kronecker_plan
    assert not any(m.training for m in data.modules())
    fits = data.data_fit.layers
    assert fits.keys() == {layer.size.name for layer in data.kronecker_plan.converted}
    assert all(fit.data_error < fit.weights_error for fit in fits.values())


def test_layers_are_fitted_in_the_order_in_which_they_are_met():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(20, 12), nn.Linear(24, 20)

        def forward(self, x):
            return self.last(self.first(x).relu())

    x = torch.randn(300, 24) @ torch.randn(24, 24)
    model = Backwards()
    rules = {"re:.*": {"rank": 5}}
    student = kronbert.convert(model, rules=rules, init="data", calibration=[x[:99], x[99:]])
    assert list(student.data_fit.layers) == ["first", "last"]
    assert student.data_fit.tokens == 300
    # The last layer sees the fitted first one's outputs: its error is measured on those.
    with torch.no_grad():
        wanted = model(x)
        missed = wanted - student(x)
        error = (missed.square().sum() / (wanted - wanted.mean(0)).square().sum()).sqrt().item()
    assert student.data_fit.layers["last"].data_error == pytest.approx(error, rel=1e-4)
    # And its bias leaves no mean error.
    assert missed.mean(0).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_is_the_optimum(bias, monkeypatch):
    """Against a brute-force reduced-rank regression; without a bias the means count."""
    monkeypatch.setattr(data_init, "RIDGE", 1e-9)
    model = nn.Linear(14, 9, bias=bias)
    x = (torch.randn(400, 14) @ torch.randn(14, 14) + 2 * torch.randn(14)).double()
    model = model.double()
    student = kronbert.convert(model, rules={"": {"rank": 3}}, init="data", calibration=[x])
    centred = x - x.mean(0) if bias else x
    y = centred @ model.weight.detach().T
    left = torch.linalg.svdvals(y)[3:].square().sum().item()
    with torch.no_grad():
        assert (model(x) - student(x)).square().sum().item() == pytest.approx(left, rel=1e-5)


def test_padding_does_not_count():
    teacher = classifier()
    clean = sentences(4)
    spoilt = copy.deepcopy(clean)
    for batch in spoilt:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    students = [
        kronbert.convert(teacher, rules=LOW_RANK, init="data", calibration=batches)
        for batches in (clean, spoilt)
    ]
    for one, other in zip(*(s.parameters() for s in students), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in clean)
    assert students[0].data_fit.tokens == tokens
    spoilt[0]["attention_mask"][:] = 1
    third = kronbert.convert(teacher, rules=LOW_RANK, init="data", calibration=spoilt)
    assert third.data_fit.layers != students[0].data_fit.layers


def test_token_rows():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    value = torch.arange(6.0).view(2, 3, 1)
    assert token_rows(value, mask).flatten().tolist() == [0, 1, 3]
    assert token_rows(value.view(6, 1), mask).flatten().tolist() == [0, 1, 3]
    heads = value[:, :, None, :].expand(2, 3, 2, 1)
    assert token_rows(heads, mask).flatten().tolist() == [0, 0, 1, 1, 3, 3]
    assert token_rows(value[:, 0], mask).flatten().tolist() == [0, 3]
    assert token_rows(value, None).shape == (6, 1)
    swapped = value.transpose(0, 1)  # (tokens, batch), as XLNet has it
    assert token_rows(swapped, mask).flatten().tolist() == [0, 3, 1]


def test_moments_are_those_of_the_rows_and_add_up():
    x, y = torch.randn(50, 5) + 30, torch.randn(50, 3) - 20
    parts = [(x[:20], y[:20]), (x[20:], y[20:])]
    whole = pair_moments(input_moments([x[:20], x[20:]]), *zip(*parts, strict=True))
    joint = torch.cov(torch.cat([x, y], 1).double().T, correction=0)
    torch.testing.assert_close(whole.inputs.gram, joint[:5, :5], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.cross, joint[5:, :5], rtol=1e-5, atol=1e-6)
    assert whole.variance == pytest.approx(joint[5:, 5:].diagonal().sum().item())
    first, second = (pair_moments(input_moments([a]), [a], [b]) for a, b in parts)
    added = first + second
    assert isinstance(added, Moments)
    for one, other in zip(added.about_zero(), whole.about_zero(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(added.inputs.gram, whole.inputs.gram, rtol=1e-5, atol=1e-5)
    assert added.variance == pytest.approx(whole.variance)
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    missed = y.double() - F.linear(x.double(), weight, bias)
    error = (missed.square().sum() / 50 / whole.variance) ** 0.5
    assert whole.output_error(weight, bias) == pytest.approx(error.item(), rel=1e-5)


def test_what_the_walks_gave_is_let_go(monkeypatch):
    """A layer's outputs of all batches are as large as what the models themselves hold."""
    given_by, held = {}, []
    moments, reach = data_init._Fit._moments, data_init._Fit._reach

    def noted(self, name, given, wanted):
        if name.endswith("intermediate.dense"):  # afterwards the model has no use for it
            given_by[name] = [weakref.ref(value) for value in wanted]
        return moments(self, name, given, wanted)

    def reached(self, walk, name, batch):
        stop = reach(self, walk, name, batch)
        held.extend(n for n, values in given_by.items() if values[batch]() is not None)
        return stop

    monkeypatch.setattr(data_init._Fit, "_moments", noted)
    monkeypatch.setattr(data_init._Fit, "_reach", reached)
    kronbert.convert(classifier(), rules=LOW_RANK, init="data", calibration=sentences(3))
    assert len(given_by) == 2
    assert not held


def test_rows_of_a_table_are_weighted_by_how_often_they_occur():
    table = nn.Embedding(200, 16)
    ids = torch.randint(20, (4, 50))
    rules = {"": {"rank": 6}}
    student = kronbert.convert(table, rules=rules, init="data", calibration=[ids])
    by_weight = kronbert.convert(table, rules=rules)
    with torch.no_grad():
        missed, before = ((table(ids) - s(ids)).square().sum() for s in (student, by_weight))
        wanted = (table(ids) - table(ids).mean((0, 1))).square().sum()
    assert missed < 0.8 * before
    fit = student.data_fit.layers[""]
    assert fit.data_error == pytest.approx((missed / wanted).sqrt().item(), rel=1e-4)
    assert fit.weights_error == pytest.approx((before / wanted).sqrt().item(), rel=1e-4)


def test_blocks_of_rows_are_fitted_to_the_words_that_occur():
    table = nn.Embedding(200, 16, dtype=torch.float64)
    before = table.weight.detach().clone()
    ids = torch.cat([torch.randint(20, (4, 50)), torch.randint(200, (4, 9))], 1)
    rules = {"": "2:200x1*1x16 + 3:15x1*1x16@4 + 200x4*1x4"}
    student = kronbert.convert(table, rules=rules, init="data", calibration=[ids])
    by_weight = kronbert.convert(table, rules=rules)
    assert torch.equal(table.weight, before)
    with torch.no_grad():
        missed, by_weight_missed = (
            (table(ids) - s(ids)).square().sum() for s in (student, by_weight)
        )
        wanted = (table(ids) - table(ids).mean((0, 1))).square().sum()
    assert missed < 0.9 * by_weight_missed
    fit = student.data_fit.layers[""]
    assert fit.kept is None
    assert fit.data_error == pytest.approx((missed / wanted).sqrt().item())
    assert fit.weights_error == pytest.approx((by_weight_missed / wanted).sqrt().item())
    count = torch.bincount(ids.flatten(), minlength=200) + data_init.SMOOTHING
    pairs = nearest_rows(table.weight.detach(), count, student.groups)
    for matrix, pair in zip(student.matrices("a"), pairs, strict=True):
        torch.testing.assert_close(matrix.detach(), pair[0].transpose(0, 1))


def test_a_table_whose_rows_share_rows_says_that_it_kept_its_fit():
    table = nn.Embedding(200, 16)
    ids = torch.randint(200, (4, 50))
    rules = {"": "100x4*2x4"}
    student = kronbert.convert(table, rules=rules, init="data", calibration=[ids])
    assert torch.equal(student.a, kronbert.convert(table, rules=rules).a)
    assert "b_out > 1" in student.data_fit.layers[""].kept


def test_in_place_is_the_same_student_and_keeps_its_parameters():
    teacher = BertForMaskedLM(BertConfig(**SMALL)).train()
    batches = sentences(3)
    apart = kronbert.convert(teacher, rules=LOW_RANK, init="data", calibration=batches)
    bias = teacher.cls.predictions.bias
    query = teacher.bert.encoder.layer[0].attention.self.query.bias
    same = kronbert.convert(teacher, rules=LOW_RANK, init="data", calibration=batches, inplace=True)
    assert same is teacher
    assert all(module.training for module in same.modules())
    assert same.bert.encoder.layer[0].attention.self.query.bias is query
    assert same.cls.predictions.decoder.bias is bias is same.cls.predictions.bias
    assert same.cls.predictions.decoder.table is same.bert.embeddings.word_embeddings
    for (name, one), (_, other) in zip(
        same.named_parameters(), apart.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    for layer in (apart, same):
        assert layer.cls.predictions.decoder not in layer.data_fit.layers
    assert not hasattr(kronbert.merge(same), "data_fit")


def test_gpt2s_conv1d_is_fitted():
    config = GPT2Config(vocab_size=200, n_embd=48, n_layer=2, n_head=4, n_positions=32)
    teacher = GPT2Model(config).eval()
    rules = {"re:.*(c_attn|c_proj|c_fc)": {"rank": 8}}
    student = kronbert.convert(teacher, rules=rules, init="data", calibration=sentences(8))
    fits = student.data_fit.layers
    assert list(fits)[:4] == [
        f"h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert all(fit.data_error < fit.weights_error for fit in fits.values())


def test_a_layer_met_several_times_is_fitted_to_all_of_its_calls():
    config = AlbertConfig(**{**SMALL, "embedding_size": 24, "num_hidden_layers": 3})
    teacher = AlbertModel(config).eval()
    rules = {"re:.*(query|ffn)": {"rank": 8}}
    student = kronbert.convert(teacher, rules=rules, init="data", calibration=sentences(6))
    fits = student.data_fit.layers
    assert len(fits) == 2
    assert all(fit.data_error < fit.weights_error for fit in fits.values())


def test_all_calls_of_a_shared_layer_count_alike():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(12, 10)

        def forward(self, x):
            return self.one(x[:, :12]) + self.one(x[:, 12:])

    model, x = Twice(), torch.randn(99, 24) @ torch.randn(24, 24) + torch.randn(24)
    twice = kronbert.convert(model, rules={"one": {"rank": 3}}, init="data", calibration=[x])
    rows = torch.cat([x[:, :12], x[:, 12:]])
    once = kronbert.convert(model.one, rules={"": {"rank": 3}}, init="data", calibration=[rows])
    torch.testing.assert_close(twice.one.weight, once.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice.one.bias, once.bias, rtol=1e-4, atol=1e-4)


def test_positions_beyond_the_calibration_are_as_good_as_those_in_it():
    teacher = BertModel(BertConfig(**{**SMALL, "max_position_embeddings": 144})).eval()
    name, batches = "embeddings.position_embeddings", sentences(3)
    rules = {name: {"rank": 4}}
    student = kronbert.convert(teacher, rules=rules, init="data", calibration=batches)
    plain = kronbert.convert(teacher, rules=rules)
    assert torch.equal(*(model.get_submodule(name).weight for model in (student, plain)))
    fit = student.data_fit.layers[name]
    assert "positions are fitted to the weight alone" in fit.kept
    # The error that is told counts positions where tokens stand.
    count = torch.zeros(144, dtype=torch.float64)
    for batch in batches:
        count[: batch["attention_mask"].shape[1]] += batch["attention_mask"].sum(0)
    dense, table = (
        model.get_submodule(name).weight.detach().double() for model in (teacher, student)
    )
    share = (count / count.sum())[:, None]
    spread = (share * (dense - (share * dense).sum(0)).square()).sum()
    expected = ((share * (dense - table).square()).sum() / spread).sqrt()
    assert fit.weights_error == fit.data_error == pytest.approx(float(expected), rel=1e-4)


def test_a_long_loader_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(calibration, "READ_AT_MOST", 100)
    read = []

    def loader():
        for batch in sentences(9):
            read.append(batch)
            yield batch

    batches = calibration.calibration_batches("data", loader())
    assert len(batches) == len(read) == 2


def test_the_report_is_a_table_and_json():
    teacher = classifier()
    student = kronbert.convert(teacher, rules=LOW_RANK, init="data", calibration=sentences(2))
    fit = student.data_fit
    lines = str(fit).splitlines()
    assert len(lines) == 2 + len(fit.layers)
    name, one = next(iter(fit.layers.items()))
    assert lines[2].split() == [name, f"{one.weights_error:.4f}", f"{one.data_error:.4f}"]
    row = fit.to_json()["layers"][name]
    expected = {"weights_error": one.weights_error, "data_error": one.data_error, "kept": None}
    assert row == expected


def test_single_sentences_are_walked_through_together(monkeypatch):
    """Each batch costs two threads; the fit is that of one batch."""
    model, walked = classifier(), []
    real = data_init.Walk
    monkeypatch.setattr(data_init, "Walk", lambda *given: walked.append(1) or real(*given))
    monkeypatch.setattr(calibration, "APART", 29)
    ids = torch.randint(5, model.config.vocab_size, (30, 12))
    mask = torch.ones_like(ids)
    mask[::3, 7:] = 0
    one = {"input_ids": ids, "attention_mask": mask}
    several = [{name: x[i : i + 1] for name, x in one.items()} for i in range(30)]
    fits = []
    for batches in ([one], several):
        walked.clear()
        student = kronbert.convert(model, factor=3, init="data", calibration=batches)
        fits.append(student.state_dict())
        assert len(walked) == 3  # one for the order, two side by side
    for name, value in fits[0].items():
        torch.testing.assert_close(value, fits[1][name])
    uneven = [{"input_ids": ids[:2], "position_ids": torch.arange(12)[None]}] * 31
    assert len(calibration.calibration_batches("data", uneven)) == 31
    assert len(calibration.calibration_batches("data", several[:29])) == 29
    blank = {"input_ids": ids[:1], "attention_mask": torch.zeros(1, 12)}
    assert len(calibration.calibration_batches("data", [{"input_ids": ids[:0]}, blank, one])) == 1
    monkeypatch.setattr(calibration, "TOGETHER", 24)
    plain = [{"input_ids": row[None]} for row in ids]
    assert len(calibration.calibration_batches("data", plain)) == 15  # of two rows of 12 tokens
