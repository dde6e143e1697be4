"""This library's own recipe: general text for students of a bare encoder, two steps for a task."""

from __future__ import annotations

from dataclasses import replace

from kronbert.distill.objectives import Objective, Term
from kronbert.distill.recipes import Recipe
from kronbert.distill.stages import Stage
from kronbert.distill.tasks import plain_name
from kronbert.errors import DistillError

LARGE = ("sst2", "qnli", "qqp", "mnli")
"""GLUE's larger training sets."""

ENOUGH = 800_000
"""Tokens of a large training set, which has 1.5 passes of its own rows in batches of 64: SST-2 has
875,000, GLUE's other large ones millions. A part of one counts by its own."""

SHORT = ("cola",)
"""Sentences of a dozen tokens, made many: batches of 128."""

TOKENS_WANTED = 2_140_000
"""In the rows of stage 2: 40,000 of MRPC, 188,000 of CoLA. A student 8 times smaller that learns
from MRPC's 3,668 alone knows them by heart: its dev loss rises within three passes. What is lacking
is spliced from two rows each: copies with words replaced teach it the same rows again, and so do
half as many splices in twice the passes."""

REGRESSION = ("stsb",)

SPREAD = 2.144
"""The variance of STS-B's scores, on which the weight of a score's square error, 1, was found."""

SHORTEST = 8
"""Tokens of a piece of general text, at least."""


def general_objective(*, mlm: bool = False) -> Objective:
    """Stage 1: hidden states and the embedding, and masked words where the student has the head.

    Without KroneckerBERT's score term: with it at weight 1 it is most of the loss. After 160,000
    tokens of Wikipedia the hidden states of a MiniLM student 8 times smaller were 0.935 off,
    without it 0.853 after 80,000 (held-out mean squared error, summed over 6 layers)."""
    terms = (Term(tap="embedding"), Term(tap="ffn"))
    return Objective(terms=(*terms, Term(tap="mlm")) if mlm else terms)


def general_stage(*, mlm: bool = False, max_length: int = 128) -> Stage:
    """Stage 1 on general text: 32 blocks of 128 tokens a step, whole or cut in 2, 4 or 8; no
    dropout, no weight decay.

    A student of whole blocks alone (8 times smaller than MiniLM) is 0.45 off on Wikipedia in whole
    blocks, but 0.72 on CoLA's and SST-2's sentences (squared error of the hidden states, summed
    over 6 layers)."""
    return Stage(
        name="general",
        objective=general_objective(mlm=mlm),
        learning_rate=3e-3,
        muon_rate=2.0,
        epochs=1,
        batch_size=32,
        max_length=max_length,
        warmup_ratio=0.05,
        weight_decay=0.0,
        dropout=0.0,
        pieces=tuple(
            max_length // parts
            for parts in (8, 4, 2, 1)
            if max_length % parts == 0 and max_length // parts >= SHORTEST
        ),
    )


def sentence_stage(*, max_length: int = 128) -> Stage:
    """For students of sentence encoders, after `general_stage`: 128 sentences a step, of which the
    embeddings (means over tokens) shall point where the teacher's do.

    The hidden states cost nothing: by the embeddings alone a student 8 times smaller than MiniLM
    was no nearer after 400,000 tokens."""
    terms = (Term(tap="embedding"), Term(tap="ffn"), Term(tap="sentence", weight=10.0))
    return replace(
        general_stage(max_length=max_length),
        name="sentences",
        objective=Objective(terms=terms),
        learning_rate=1e-3,
        batch_size=128,
        pieces=(),
    )


def is_large(task: str | None, tokens: int | None) -> bool:
    """Whether a training set is: by its ``tokens``; None: by what GLUE's of that name has."""
    if tokens is not None:
        return tokens >= ENOUGH
    return task is not None and plain_name(task) in LARGE


def tokens_wanted(task: str | None = None, tokens: int | None = None) -> int:
    """In the rows of stage 2; 0: as many as the training set has."""
    return 0 if is_large(task, tokens) else TOKENS_WANTED


def task_stages(
    task: str | None = None,
    *,
    tokens: int | None = None,
    regression: bool | None = None,
    spread: float | None = None,
    max_length: int = 128,
) -> tuple[Stage, Stage]:
    """Stage 2 for a GLUE name, or for any task: hidden states first, the teacher's answers then.

    As in TinyBERT, whose prediction layer is learnt last: the student's head is the teacher's, so
    hidden states that agree answer as it does, and the answers alone disturb them. No labels, so
    that rows without them can be read as well. tokens: in the training rows, which tell whether
    they are many (`ENOUGH`); None: as many as GLUE has. regression: one logit has no softmax, so
    its square error is taken instead of a KL; None: what GLUE says of the name. spread: the scores'
    variance, by which that error is divided (times `SPREAD`), so that it weighs as much in any
    unit."""
    if spread is not None and not spread > 0:
        raise DistillError(f"task_stages(spread={spread}): expected a variance > 0.")
    word, large = plain_name(task) if task else "", is_large(task, tokens)
    known = word in REGRESSION if regression is None else regression
    hidden = (Term(tap="embedding"), Term(tap="ffn"))
    weight = float(f"{SPREAD / spread:.3g}") if known and spread is not None else 1.0
    answers = Term(tap="logits", loss="mse" if known else "kl", weight=weight)
    first = Stage(
        name="intermediate",
        objective=Objective(terms=hidden),
        learning_rate=2e-3 if word in SHORT else 1e-3,
        muon_rate=2.0,
        epochs=1,
        batch_size=128 if word in SHORT else 64 if large else 32,
        max_length=max_length,
        weight_decay=0.0,
        dropout=0.0,
    )
    last = replace(
        first,
        name="task",
        objective=Objective(terms=(*hidden, answers)),
        learning_rate=first.learning_rate / 5,
        epochs=0.5,
    )
    return first, last


def kronbert(
    *,
    task: str | None = None,
    tokens: int | None = None,
    regression: bool | None = None,
    spread: float | None = None,
    mlm: bool = False,
    max_length: int = 128,
) -> Recipe:
    """Stage 1 on general text, and both steps of stage 2, for any factor; see `task_stages`."""
    return Recipe(
        name="kronbert",
        paper="none: this library's",
        stages=(
            general_stage(mlm=mlm, max_length=max_length),
            *task_stages(
                task, tokens=tokens, regression=regression, spread=spread, max_length=max_length
            ),
        ),
        tokens_wanted=tokens_wanted(task, tokens),
    )
