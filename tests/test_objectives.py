"""Losses against their definitions in float64, and objectives as data."""

import json
from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kronbert.distill import Objective, Term
from kronbert.distill.objectives import (
    cosine_sentence,
    kl_logits,
    mse_hidden,
    mse_logits,
    mse_scores,
    term_losses,
)
from kronbert.distill.taps import Captured
from kronbert.errors import DistillError


def scores_by_pairs(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The definition: mean over sequences, heads and unpadded pairs of (o_s - o_t)²."""
    o_s = q_s @ k_s.transpose(-1, -2) / sqrt(q_s.shape[-1])
    o_t = q_t @ k_t.transpose(-1, -2) / sqrt(q_t.shape[-1])
    square = (o_s - o_t) ** 2
    if mask is None:
        return square.mean()
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).bool().expand_as(square)
    return square[pairs].mean()


def sample(tokens: int, d_s: int, d_t: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, tokens, d).to(dtype) for d in (d_s, d_s, d_t, d_t)]


def ragged(tokens: int) -> Tensor:
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, tokens // 2 :] = 0
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("d_s", "d_t"), [(4, 4), (4, 7)])
@pytest.mark.parametrize("tokens", [5, 40], ids=["plain", "gram"])
def test_mse_scores_is_its_definition(tokens, d_s, d_t, masked):
    parts, mask = sample(tokens, d_s, d_t), ragged(tokens) if masked else None
    student = [x.requires_grad_() for x in parts[:2]]
    ours, exact = mse_scores(*parts, mask), scores_by_pairs(*parts, mask)
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(
        torch.autograd.grad(ours, student), torch.autograd.grad(exact, student)
    )


@pytest.mark.parametrize("tokens", [5, 20], ids=["plain", "gram"])
@pytest.mark.parametrize("d_t", [2, 3])
def test_mse_scores_gradcheck(tokens, d_t):
    parts = [x.requires_grad_() for x in sample(tokens, 2, d_t)]
    assert torch.autograd.gradcheck(lambda *x: mse_scores(*x, ragged(tokens)), parts)
    assert torch.autograd.gradgradcheck(lambda *x: mse_scores(*x), parts, atol=1e-4)


def test_padded_positions_do_not_count():
    parts, mask = sample(8, 3, 3), ragged(8)
    loud = [torch.where(mask[:, None, :, None].bool(), x, 1e6) for x in parts]
    assert mse_scores(*loud, mask) == mse_scores(*parts, mask)
    hidden = [torch.where(mask[..., None].bool(), x[:, 0], torch.nan) for x in parts[1:3]]
    assert mse_hidden(*hidden, mask) == mse_hidden(parts[1][:, 0], parts[2][:, 0], mask)


@pytest.mark.parametrize("tokens", [16, 64], ids=["plain", "gram"])
def test_mse_scores_is_exact_when_the_student_is_close(tokens):
    teacher = [torch.randn(2, 3, tokens, 8, dtype=torch.float64) for _ in range(2)]
    student = [x + 1e-4 * torch.randn_like(x) for x in teacher]
    parts = [x.float() for x in (*student, *teacher)]
    exact = scores_by_pairs(*(x.double() for x in parts))
    assert exact < 1e-6  # an S x S difference squared in float32 would keep few digits of this
    assert abs(mse_scores(*parts) - exact) < 1e-4 * exact


def test_mse_scores_is_float32_under_autocast():
    parts = sample(64, 8, 8, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mse_scores(*parts)
    assert loss.dtype == torch.float32
    exact = scores_by_pairs(*(x.double() for x in parts))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_long_sequences_build_no_square_matrix():
    parts = [torch.randn(1, 2, 600, 4, requires_grad=True) for _ in range(4)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch():
        mse_scores(*parts).backward()
    assert largest <= 2 * 600 * 8  # 2 heads, both models' d side by side


def test_mse_scores_refuses_other_heads():
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 2, 5, 4)
    with pytest.raises(DistillError, match=r"student \(2, 3, 5, 4\) and teacher \(2, 2, 5, 4\)"):
        mse_scores(q, q, k, k)


@pytest.mark.parametrize("other", [(1, 3, 5, 4), (2, 3, 1, 4)], ids=["batch", "tokens"])
def test_mse_scores_stretches_no_side(other):
    q, k = torch.randn(2, 3, 5, 4), torch.randn(other)
    with pytest.raises(DistillError, match="differ in batch, heads or tokens"):
        mse_scores(q, q, k, k)


@pytest.mark.parametrize("loss", [mse_logits, kl_logits])
def test_logits_of_other_classes_are_not_stretched(loss):
    with pytest.raises(DistillError, match=r"logits: student \(4, 3\), teacher \(4, 1\)"):
        loss(torch.randn(4, 3), torch.randn(4, 1))


def test_nothing_but_padding_is_a_loss_of_zero():
    s, t, none = torch.randn(2, 6, 5), torch.randn(2, 6, 5), torch.zeros(2, 6).long()
    assert mse_hidden(s, t, none) == 0
    assert mse_logits(s, t, none[..., None]) == 0
    assert kl_logits(s, t, none[..., None]) == 0
    assert mse_scores(*sample(6, 4, 4), none) == 0


def test_what_overflows_in_padding_leaves_no_trace():
    """0 times the derivative of an infinite square would be NaN."""
    mask = ragged(6)
    for loss, keep in ((mse_hidden, mask), (mse_logits, mask[..., None]), (cosine_sentence, mask)):
        s, t = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 6, 5)
        loud = t.masked_fill(~mask.bool()[..., None], torch.inf)
        (expected,) = torch.autograd.grad(loss(s, t, keep), s)
        (found,) = torch.autograd.grad(loss(s, loud, keep), s)
        assert torch.equal(found, expected)


def test_a_row_of_padding_alone_is_no_sentence():
    t, mask = torch.randn(3, 6, 5), torch.ones(3, 6)
    mask[1] = 0
    assert abs(cosine_sentence(2 * t, t, mask)) < 1e-6
    away = cosine_sentence(-t, t, mask)
    torch.testing.assert_close(away, torch.tensor(2.0))


def test_mse_hidden_is_the_mean_over_unpadded_tokens():
    s, t, mask = torch.randn(2, 6, 5), torch.randn(2, 6, 5), ragged(6)
    expected = torch.cat([((s - t) ** 2)[0], ((s - t) ** 2)[1, :3]]).mean()
    torch.testing.assert_close(mse_hidden(s, t, mask), expected)
    torch.testing.assert_close(mse_hidden(s, t), ((s - t) ** 2).mean())
    with pytest.raises(DistillError, match=r"hidden states: student \(2, 6, 5\), teacher"):
        mse_hidden(s, t[..., :4])


def test_cosine_sentence_is_half_the_square_of_the_normalised_means():
    s, t, mask = torch.randn(2, 6, 5), torch.randn(2, 6, 5), ragged(6)

    def means(x):
        pooled = torch.stack([x[0].mean(0), x[1, :3].mean(0)])
        return pooled / pooled.norm(dim=-1, keepdim=True)

    expected = (means(s) - means(t)).square().sum(-1).mean() / 2
    torch.testing.assert_close(cosine_sentence(s, t, mask), expected)
    loud = s.masked_fill(~mask.bool()[..., None], torch.nan)
    assert cosine_sentence(loud, t, mask) == cosine_sentence(s, t, mask)
    assert abs(cosine_sentence(3 * t, t, mask)) < 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cosine_sentence(s.bfloat16(), t.bfloat16(), mask).dtype == torch.float32
    with pytest.raises(DistillError, match=r"last hidden states: student \(2, 6, 5\), teacher"):
        cosine_sentence(s, t[..., :4])


def test_kl_logits_is_the_definition():
    s, t = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(kl_logits(s, t, temperature=2.0), expected)
    assert kl_logits(s, s) == 0


def test_masked_logits_rows_and_classes():
    s, t, mask = torch.randn(2, 6, 5), torch.randn(2, 6, 5), ragged(6)
    rows = mask[:, :, None]
    kept_s, kept_t = s[mask.bool()], t[mask.bool()]
    torch.testing.assert_close(kl_logits(s, t, rows), kl_logits(kept_s, kept_t))
    torch.testing.assert_close(mse_logits(s, t, rows), mse_logits(kept_s, kept_t))
    # Question answering: the softmax runs over tokens, of which the second sequence has three.
    s, t = s.mT, t.mT
    one = kl_logits(s[:1], t[:1]) + kl_logits(s[1:, :, :3], t[1:, :, :3])
    torch.testing.assert_close(kl_logits(s, t, mask[:, None, :]), one / 2)


def test_a_masked_class_is_not_seen_below_any_others():
    s, t, mask = torch.randn(2, 5), torch.randn(2, 5), torch.tensor([1, 1, 0, 1, 0])
    kept = mask.bool()
    expected = kl_logits(s[:, kept], t[:, kept])
    for level in (-200.0, 200.0):
        torch.testing.assert_close(
            kl_logits(s + level, t + level, mask), expected, rtol=1e-3, atol=0
        )


FULL = Objective(
    terms=(
        Term(tap="scores", weight=0.5),
        Term(tap="logits", loss="kl", temperature=2.0),
        Term(tap="logits"),
        Term(tap="labels"),
        Term(tap="ffn", weight=0),
    ),
    layer_map=(0, 3),
)


def test_objective_survives_json():
    assert Objective.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL


def test_objective_names_and_needs():
    assert [FULL.name(t) for t in FULL.active] == ["scores", "logits_kl", "logits_mse", "labels"]
    assert FULL.teacher_taps == {"scores", "logits"}
    assert FULL.label_tap == "labels"
    assert Objective(terms=(Term(tap="mlm"),)).teacher_taps == set()
    off = (Term(tap="labels", weight=0), Term(tap="logits", loss="kl", weight=0))
    soft = Objective(terms=(Term(tap="logits"), *off))
    assert soft.label_tap is None
    assert soft.name(soft.terms[0]) == "logits"


def test_an_objective_of_lists_is_one_of_tuples():
    assert Objective(terms=list(FULL.terms), layer_map=[0, 3]) == FULL


def captured(layers: int, loss: Tensor | None = None) -> Captured:
    """A pass whose layers all differ."""
    ffn, query, key = (
        {n: torch.randn(*size) for n in range(1, layers + 1)}
        for size in ((2, 6, 5), (2, 3, 6, 4), (2, 3, 6, 4))
    )
    outputs = SimpleNamespace(logits=torch.randn(2, 3), loss=loss)
    return Captured(ffn=ffn, query=query, key=key, outputs=outputs)


def test_layers_are_summed_and_logits_have_their_temperature():
    student, teacher, mask = captured(3, torch.tensor(0.75).half()), captured(6), ragged(6)
    terms = (Term(tap="ffn"), *FULL.terms[:2], FULL.terms[3])
    found = term_losses(Objective(terms=terms), student, teacher, mask, (4, 0, 2))
    assert list(found) == ["ffn", "scores", "logits", "labels"]
    pairs = ((1, 4), (3, 2))
    ffn = [mse_hidden(student.ffn[m], teacher.ffn[n], mask) for m, n in pairs]
    torch.testing.assert_close(found["ffn"], ffn[0] + ffn[1])
    scores = [
        mse_scores(student.query[m], student.key[m], teacher.query[n], teacher.key[n], mask)
        for m, n in pairs
    ]
    torch.testing.assert_close(found["scores"], scores[0] + scores[1])
    soft = kl_logits(student.outputs.logits, teacher.outputs.logits, temperature=2.0)
    torch.testing.assert_close(found["logits"], soft)
    torch.testing.assert_close(found["labels"], torch.tensor(0.75))  # in float32


def test_terms_that_have_nothing_to_compare():
    with pytest.raises(DistillError, match="'labels', but SimpleNamespace came without a loss"):
        term_losses(Objective(terms=(Term(tap="labels"),)), captured(1), None, None)
    with pytest.raises(DistillError, match="'logits', which needs a teacher"):
        term_losses(Objective(terms=(Term(tap="logits"),)), captured(1), None, None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Term(tap="score"), "'score' *.* is not a tap. Nearest: 'scores'"),
        (lambda: Term(tap="ffn", loss="kl"), "tap='ffn', loss='kl'.: expected mse"),
        (lambda: Term(tap="ffn", weight=-1), "weight=-1.: expected a finite number >= 0"),
        (lambda: Term(tap="ffn", weight=float("nan")), "weight=nan.: expected a finite"),
        (lambda: Term(tap="ffn", weight=float("inf")), "weight=inf.: expected a finite"),
        (lambda: Term(tap="ffn", weight="1"), "weight='1'.: expected a finite"),  # type: ignore[arg-type]
        (
            lambda: Term(tap="logits", loss="kl", temperature="2"),  # type: ignore[arg-type]
            "temperature='2'.: expected a num",
        ),
        (lambda: Term(tap="logits", loss="kl", temperature=float("inf")), "temperature=inf.: exp"),
        (lambda: Term(tap="logits", loss="kl", temperature=0), "temperature=0.: expected a number"),
        (lambda: Term(tap="logits", temperature=2), "only loss='kl' has a temperature"),
        (lambda: Term(tap="logits", temperature=0.5), "only loss='kl' has a temperature"),
        (lambda: Objective(terms=()), "no term has a weight above 0"),
        (lambda: Objective(terms=(Term(tap="ffn"),) * 2), "two terms are tap='ffn', loss='mse'"),
        (lambda: Objective(terms=(Term(tap="mlm"), Term(tap="labels"))), "the same loss"),
        (lambda: Objective(terms=(Term(tap="ffn"),), layer_map="half"), "'half' is not known"),
        (lambda: Objective.from_dict({"term": []}), "unknown key 'term'. Nearest: 'terms'"),
        (lambda: Objective.from_dict({"terms": [{"tab": "ffn"}]}), "Term: unknown key 'tab'"),
        (lambda: Objective.from_dict({"terms": [{"weight": 1}]}), "Term: needs tap"),
    ],
)
def test_what_an_objective_refuses(make, text):
    with pytest.raises(DistillError, match=text):
        make()
