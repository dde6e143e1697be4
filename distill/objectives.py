"""What a student is trained on: losses between tensors, and weighted sums of them as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor

from kronbert.distill import layer_maps
from kronbert.distill.numbers import is_number, plain
from kronbert.distill.taps import Captured
from kronbert.errors import DistillError, near

# For each tap the losses it may have, the default first. "own": the loss the student's own head
# computes from the batch's labels, so classification, regression, several labels, tokens, spans and
# masked words need no code here.
LOSSES: dict[str, tuple[str, ...]] = {
    "embedding": ("mse",),
    "scores": ("mse",),
    "ffn": ("mse",),
    "sentence": ("cosine",),
    "logits": ("mse", "kl"),
    "labels": ("own",),
    "mlm": ("own",),
}

# A logit no softmax can see, finite so that 0 * it is 0.
_NEVER = -1e4


@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand. tap: a key of `LOSSES`. loss: one of its values, the first if None. weight >= 0;
    0 is not computed. temperature > 0 divides the logits of ``loss="kl"``, which is then multiplied
    by its square."""

    tap: str
    loss: str | None = None
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.tap, str) or self.tap not in LOSSES:
            raise DistillError(
                f"Term(tap={self.tap!r}) is not a tap. {near(str(self.tap), list(LOSSES))}"
            )
        if self.loss is None:
            object.__setattr__(self, "loss", LOSSES[self.tap][0])
        if self.loss not in LOSSES[self.tap]:
            raise DistillError(
                f"Term(tap={self.tap!r}, loss={self.loss!r}): expected "
                f"{' or '.join(LOSSES[self.tap])}."
            )
        for key in ("weight", "temperature"):
            object.__setattr__(self, key, plain(getattr(self, key)))
        if not (is_number(self.weight) and 0 <= self.weight < inf):
            raise DistillError(
                f"Term(tap={self.tap!r}, weight={self.weight!r}): expected a finite number >= 0."
            )
        if not (is_number(self.temperature) and 0 < self.temperature < inf):
            raise DistillError(
                f"Term(tap={self.tap!r}, temperature={self.temperature!r}): expected a number > 0."
            )
        if self.temperature != 1 and self.loss != "kl":
            raise DistillError(
                f"Term(tap={self.tap!r}, loss={self.loss!r}, temperature={self.temperature!r}): "
                "only loss='kl' has a temperature."
            )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A weighted sum of terms. layer_map: "identity", "uniform", or one teacher layer (from 1; 0 or
    None = none) per student layer, for the terms scores and ffn. Hard and soft labels are mixed by
    the weights of the terms labels and logits: 0.3 and 0.7, or logits alone for rows without a
    label."""

    terms: tuple[Term, ...]
    layer_map: layer_maps.LayerMap = "identity"

    def __post_init__(self) -> None:
        for key, what in (("terms", "Terms"), ("layer_map", "a name or layers of the teacher")):
            value = getattr(self, key)
            if not isinstance(value, Iterable):
                raise DistillError(f"Objective({key}={value!r}): expected {what}.")
            if not isinstance(value, str):
                object.__setattr__(self, key, tuple(map(plain, value)))
        if not all(isinstance(term, Term) for term in self.terms):
            raise DistillError(f"Objective(terms={self.terms!r}): expected Terms.")
        layer_maps.check(self.layer_map)
        kinds = [(t.tap, t.loss) for t in self.terms]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise DistillError(
                    f"Objective: two terms are tap={kind[0]!r}, loss={kind[1]!r}: add their "
                    "weights."
                )
        if {"labels", "mlm"} <= self.taps:
            raise DistillError(
                "Objective: labels and mlm are the same loss, the student's own: keep one."
            )
        if not self.active:
            raise DistillError(
                "Objective: no term has a weight above 0: there is nothing to learn."
            )

    @property
    def active(self) -> tuple[Term, ...]:
        """The terms with a weight above 0."""
        return tuple(t for t in self.terms if t.weight > 0)

    @property
    def taps(self) -> frozenset[str]:
        """Taps of the active terms."""
        return frozenset(t.tap for t in self.active)

    @property
    def teacher_taps(self) -> frozenset[str]:
        """Taps that need a teacher."""
        return self.taps - {"labels", "mlm"}

    @property
    def label_tap(self) -> str | None:
        """The active tap that needs labels, if any."""
        return next((t.tap for t in self.active if t.loss == "own"), None)

    def name(self, term: Term) -> str:
        """What a term is logged as, without "loss_": its tap, and its loss where a tap has two."""
        shared = sum(t.tap == term.tap for t in self.active) > 1
        return f"{term.tap}_{term.loss}" if shared else term.tap

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        layer_map = self.layer_map if isinstance(self.layer_map, str) else list(self.layer_map)
        return {"terms": [asdict(t) for t in self.terms], "layer_map": layer_map}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Objective:
        """The inverse of `to_dict`; unknown keys are refused."""
        given = dict(known_keys(cls, data))
        terms = [known_keys(Term, term) for term in given.pop("terms")]
        return cls(terms=tuple(Term(**term) for term in terms), **given)


Data = TypeVar("Data", bound=Mapping[str, Any])


def known_keys(cls: Any, data: Data) -> Data:
    """``data``, once every key is a field of the dataclass ``cls``."""
    if not isinstance(data, Mapping):
        raise DistillError(f"{cls.__name__}: {data!r}: expected the dictionary that to_dict gives.")
    known = [f.name for f in fields(cls)]
    for key in data:
        if key not in known:
            raise DistillError(f"{cls.__name__}: unknown key {key!r}. {near(str(key), known)}")
    free = (MISSING, MISSING)
    needed = [f.name for f in fields(cls) if (f.default, f.default_factory) == free]
    if missing := [name for name in needed if name not in data]:
        raise DistillError(f"{cls.__name__}: needs {', '.join(missing)}, too.")
    return data


def exact(x: Tensor) -> Tensor:
    """float32, or float64 where that came in."""
    return x if x.dtype == torch.float64 else x.float()


def mse_hidden(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of (batch, tokens, hidden) over unpadded tokens; mask (batch, tokens)."""
    require_same("hidden states", student, teacher)
    off = exact(student) - exact(teacher)
    if mask is None:
        return off.square().mean()
    keep = mask.bool()
    # Before the square, whose derivative would be NaN where a padded state has overflowed.
    square = off.masked_fill(~keep[..., None], 0).square().mean(-1)
    return square.sum() / keep.sum().clamp(min=1)


def cosine_sentence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the rows of 1 - cosine of both means over unpadded tokens of (batch, tokens,
    hidden), what sentence-transformers' mean pooling gives; mask (batch, tokens).

    Half the squared distance of the normalised embeddings (Reimers and Gurevych 2020). A row of
    padding alone has none and is left out."""
    require_same("last hidden states", student, teacher)
    sums = []  # they point where the means do
    for states in (exact(student), exact(teacher)):
        kept = states if mask is None else states.masked_fill(~mask.bool()[..., None], 0)
        sums.append(kept.sum(1))
    away = 1 - torch.cosine_similarity(sums[0], sums[1], dim=-1)
    if mask is None:
        return away.mean()
    keep = mask.bool().any(-1)
    return away.masked_fill(~keep, 0).sum() / keep.sum().clamp(min=1)


def mse_scores(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean squared error of Q Kᵀ / sqrt(d) over heads and unpadded (query, key) pairs.

    Student q_s, k_s (batch, heads, tokens, d), teacher q_t, k_t the same with its own d; mask
    (batch, tokens). KroneckerBERT (Tahaei et al. 2021), L_attn of one layer: before softmax.

    The difference of both scores is one product Q Kᵀ of stacked matrices, and
    ||Q Kᵀ||² = tr((QᵀQ)(KᵀK)), so long sequences need no tokens x tokens matrix. With equal d the
    stack holds the differences of student and teacher, so nothing cancels when they agree; with
    two widths the error is about 1e-7 of the scores' own square.
    """
    if q_s.shape[:3] != q_t.shape[:3]:
        raise DistillError(
            f"attention scores: student {tuple(q_s.shape)} and teacher {tuple(q_t.shape)} differ "
            "in batch, heads or tokens. Drop the scores term, or take a student with as many heads."
        )
    d_s, d_t, tokens = q_s.shape[-1], q_t.shape[-1], q_s.shape[-2]
    with torch.autocast(q_s.device.type, enabled=False):
        q_s, k_s, q_t, k_t = (exact(x) for x in (q_s, k_s, q_t, k_t))
        if d_s == d_t:
            q, k = torch.cat(((q_s - q_t), q_t), -1) * d_s**-0.5, torch.cat((k_s, k_s - k_t), -1)
        else:
            q, k = torch.cat((q_s * d_s**-0.5, q_t * d_t**-0.5), -1), torch.cat((k_s, -k_t), -1)
        pairs: Tensor | int = max(1, q.shape[0] * tokens**2)
        if mask is not None:
            keep = mask.bool()
            pairs = keep.sum(-1).square().sum().clamp(min=1)
            padded = ~keep[:, None, :, None]
            q, k = q.masked_fill(padded, 0), k.masked_fill(padded, 0)
        # Plain / Gram in ms, 2048 tokens, 12 heads, forward and backward on one AVX512 core:
        # d 32: 14.8 / 13.0 at 128 tokens, 30.6 / 12.9 at 256; d 64: 24.8 / 48.1 and 47.9 / 46.8.
        if tokens <= 2 * (d_s + d_t):
            total = (q @ k.mT).square().sum()
        else:
            total = ((q.mT @ q) * (k.mT @ k)).sum()
        return total / (pairs * q.shape[1])


def mse_logits(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of logits (..., classes); mask broadcasts to them, None = all."""
    require_same("logits", student, teacher)
    off = exact(student) - exact(teacher)
    if mask is None:
        return off.square().mean()
    keep = mask.bool().expand_as(off)
    return off.masked_fill(~keep, 0).square().sum() / keep.sum().clamp(min=1)


def kl_logits(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """temperature² KL(teacher || student) of softmax(logits / temperature), mean over the rows.

    Hinton et al. 2015. mask broadcasts to the logits (..., classes): a masked class is left out of
    the softmax, a fully masked row of the mean.
    """
    require_same("logits", student, teacher)
    s, t = exact(student) / temperature, exact(teacher) / temperature
    rows: Tensor | int = max(1, s.numel() // s.shape[-1])
    if mask is not None:
        keep = mask.bool().expand_as(s)
        s, t = s.masked_fill(~keep, _NEVER), t.masked_fill(~keep, _NEVER)
        rows = keep.any(-1).sum().clamp(min=1)
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum() / rows * temperature**2


def require_same(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise DistillError(
            f"{what}: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}. Both models "
            "need the same kind of head, width and tokens for this term; drop it otherwise."
        )


def term_losses(
    objective: Objective,
    student: Captured,
    teacher: Captured | None,
    mask: Tensor | None,
    layers: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """Every active term's loss by `Objective.name`, before its weight; layers are summed.

    mask (batch, tokens). layers: `layer_maps.resolve`, one teacher layer per student layer.
    """
    return {
        objective.name(term): _loss(term, student, teacher, mask, layers)
        for term in objective.active
    }


def _seen(state: Tensor | None, term: Term) -> Tensor:
    if state is None:
        raise DistillError(f"the term {term.tap!r} needs what no tap has read. Add it to the taps.")
    return state


def _loss(
    term: Term,
    student: Captured,
    teacher: Captured | None,
    mask: Tensor | None,
    layers: tuple[int, ...],
) -> Tensor:
    if term.loss == "own":
        loss: Tensor | None = getattr(student.outputs, "loss", None)
        if loss is None:
            raise DistillError(
                f"the objective has the term {term.tap!r}, but {type(student.outputs).__name__} "
                "came without a loss: use a student with a head for these labels, or drop the "
                "term."
            )
        return exact(loss)
    if teacher is None:
        raise DistillError(f"the objective has the term {term.tap!r}, which needs a teacher.")
    pairs = [(m, n) for m, n in enumerate(layers, start=1) if n]
    if term.tap == "embedding":
        return mse_hidden(_seen(student.embedding, term), _seen(teacher.embedding, term), mask)
    if term.tap == "sentence":
        return cosine_sentence(_seen(student.last, term), _seen(teacher.last, term), mask)
    if term.tap == "ffn":
        return torch.stack(
            [mse_hidden(student.ffn[m], teacher.ffn[n], mask) for m, n in pairs]
        ).sum()
    if term.tap == "scores":
        q_s, k_s, q_t, k_t = student.query, student.key, teacher.query, teacher.key
        return torch.stack(
            [mse_scores(q_s[m], k_s[m], q_t[n], k_t[n], mask) for m, n in pairs]
        ).sum()
    visible = student.logits_mask(mask)
    if term.loss == "kl":
        return kl_logits(student.logits, teacher.logits, visible, term.temperature)
    return mse_logits(student.logits, teacher.logits, visible)
