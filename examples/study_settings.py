"""What the GLUE study runs: tasks, teachers, student kinds and the training of each, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kronbert.distill import Objective, Stage
from kronbert.distill.recipes.kronbert import task_stages
from kronbert.errors import DistillError, near
from kronbert.job_begin import FIT

FULL = ("sst2", "mrpc", "rte", "cola", "stsb")
"""Tasks of which the whole training and dev sets are at hand: the mean is over these."""

PARTIAL = ("qnli", "qqp", "mnli")
"""Tasks that are shown apart: their training sets may be subsets, which `is_subset` tells."""

FACTORS = (4.0, 8.0, 19.0, 30.0)
SEEDS = (42, 43, 44)

KINDS = {
    "kronbert": "**kronbert**",
    "kronbert-stage1": "kronbert from a student of general text",
    "svd": "truncated SVD",
    "svd-fitted": "truncated SVD, fitted to data",
    "svd-stage1": "truncated SVD from a student of general text",
    "paper": "single products, 1 x n embedding (KroneckerBERT's shapes)",
    "paper-fitted": "KroneckerBERT's shapes, fitted to data",
    "random": "kronbert's shapes, random start",
    "dense": "dense, two narrow layers",
}
"""Student kinds, in the order of the table."""

STAGE1 = ("kronbert-stage1", "svd-stage1")
"""Kinds that go on from a student of general text, and that only --students makes: the other kinds
start from the fine-tuned teacher, as `kronbert compress` does."""

FITTED = ("kronbert", "svd-fitted", "paper-fitted")
"""Kinds whose layers start from a fit to the task's rows (init="data"); the others' start from the
weights alone, or at random. What a structure brings shows among these."""

MAIN = "main"
"""The tag of runs without an override of their own."""

EARLIER = "earlier"
"""The tag of what were main runs until they were made anew: by word tables whose ranks followed
i ** -0.75 and with positions fitted to data (kronbert's), and from another teacher (all kinds)."""

LAW_ALONE = "law-alone"
"""The tag of kronbert's main runs at 19x that were made anew once a table's shared rank had half of
its numbers (`row_ranks.SHARED`): until then the law by itself left it rank 1."""

FROM_SIGNS = "from-signs"
"""The tag of kronbert's main runs that were made anew once a word table's blocks began at its words
(`row_ranks.FIRST_WORD`): until then half of the first one's rows were characters of other scripts,
and signs had no block of their own."""

READ_TWICE = "read-twice"
"""The tag of main runs on small training sets that were made anew once the recipe had twice the
splices in one pass (`kronbert.distill.recipes.kronbert.TOKENS_WANTED`): until then it had half as
many in two."""

AS_LARGE = "as-large"
"""The tag of MNLI's run at 19x that had the passes of a large training set for 12,988 rows, as
tasks of that name had until their tokens were counted."""

SHUFFLED = "shuffled"
"""The tag of CoLA's run at 4x whose batches of like lengths came in mixed order, as those of text
do (`kronbert.distill.sampling`)."""

ONE_TEACHER = "one-teacher"
"""The tag of runs at 19x that were made as the main ones are, all with one teacher, for variants of
several seeds to be held against."""

BESIDE = {
    **dict.fromkeys(("words-replaced", "fewer-rows", "two-passes"), EARLIER),
    **dict.fromkeys(("flat-table", "four-passes"), LAW_ALONE),
    "weights-tenth": "tenth",
    **dict.fromkeys(("ema", "labels-half", "answers-alone", "last-layer"), ONE_TEACHER),
    **dict.fromkeys(("novels", "more-rows", "four-layers", "three-layers"), ONE_TEACHER),
    **dict.fromkeys(("adamw", "late", "more-for-all", "reword"), ONE_TEACHER),
    **dict.fromkeys(("table-quarter-rate", "table-tenth-rate", "more-for-all-reword"), ONE_TEACHER),
    "batch-64": MAIN,
}
"""Variant -> the tag of the runs that it is held against, where a task has runs of it: else, and
for other variants, `READ_TWICE`, as these were made when that was the recipe, else `MAIN`."""

TEACHER: dict[str, Any] = {"learning_rate": 1e-4, "epochs": 3, "batch_size": 32, "seed": 42}
"""The fine-tuning of a teacher: fields of `Stage`, and start: a task whose teacher's encoder it
goes on from (None: the base model)."""

TEACHERS: dict[str, dict[str, Any]] = {
    "sst2": {"epochs": 2, "batch_size": 128},
    "mrpc": {"epochs": 5},
    "rte": {"start": "mnli", "learning_rate": 5e-5, "epochs": 8, "ema": 0.99},
    "cola": {"epochs": 5},
    "stsb": {"start": "mnli", "learning_rate": 5e-5, "epochs": 6, "ema": 0.99},
    "qnli": {},
    "qqp": {"epochs": 2, "batch_size": 128},
    "mnli": {"learning_rate": 1.5e-4, "epochs": 2, "batch_size": 64},
}
"""What is different from `TEACHER`: the best of two to four tries on the dev set each. From MNLI's
encoder (12,988 rows of it and 20,000 of SNLI, --snli-dir) RTE is at 63.2 to 67.5 instead of 57.8,
STS-B at 87.1 to 87.6 instead of 85.2; without SNLI's at 66.4 and 86.8. MRPC gains nothing. SST-2's
reached 89.2 instead of 88.6 to 88.9 at half the rate, in four passes in batches of 32 with weights
averaged (EMA 0.999), for twice the time. QQP's is as SST-2's is, for want of time to try others."""

WITH_SNLI = ("mnli",)
"""Tasks whose teacher also learns from the rows of --snli-dir: where no more than a subset of
MNLI's is at hand."""

RATES: tuple[float, ...] = ()
"""Learning rates that every kind may choose from for its last stage, in a short run each; none: the
recipe's."""

SEARCH_SEED = 0
"""Of the runs that choose a rate: none of the seeds that are reported."""

OUTSIDE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sst2": ("imdb", "imdb/test.tsv", ("text",)),
    "mrpc": ("paws_wiki", "paws_wiki/dev.tsv", ("sentence1", "sentence2")),
}
"""Out of distribution: task -> name, file below --ood-dir (perhaps .gz or .xz), text columns."""

INITS = ("data", "weights", "importance")
"""Of the kind kronbert: `kronbert.convert`'s, and the fit to data in which outputs count as much as
the teacher's answers depend on them (`study_starts.by_importance`)."""

HIDDEN_TAPS = ("embedding", "scores", "ffn")
"""Terms that a student of another depth and width cannot have."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the students of one task are made and trained.

    stages: one after another, as `Stage.to_dict` without seed; the last has the rate that `rates`
    are searched for, each for a ``share`` of its epochs (one rate: taken; none: the stage's own).
    init: of the kind kronbert, one of `INITS`; it and the other kinds of `FITTED` are fitted to
    ``calibration_rows`` training rows and ``calibration_text`` sentences of --text. splice: rows
    made of two, None: as many as the recipe wants; reword: share of their words that become others;
    augment: copies per row with words replaced; text_rows: sentences of --text; transfer: other
    tasks and how many of their training rows; all without labels, for stages that read none.
    start: a task whose student of the same kind, factor, seed and tag it goes on from.
    structure: of the kind kronbert, a key of `study_structures.STRUCTURES`. layers: how many the
    students have, as `kronbert.fewer_layers` takes it; None: the teacher's. after: a tag; this run
    has only the last stage of its own and goes on from where that tag's run of the same task, kind,
    factor and seed was before its last.
    """

    stages: tuple[dict[str, Any], ...]
    rates: tuple[float, ...] = RATES
    share: float = 0.25
    init: str = "data"
    calibration_rows: int = FIT
    calibration_text: int = 0
    splice: int | None = None
    reword: float = 0.0
    augment: int = 0
    text_rows: int = 0
    transfer: Mapping[str, int] = field(default_factory=dict)
    start: str | None = None
    structure: str = "planned"
    layers: int | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "rates", tuple(self.rates))
        if self.init not in INITS:
            raise DistillError(f"init={self.init!r}: expected one of {', '.join(INITS)}.")
        if not self.stages:
            raise DistillError("stages: expected one or more.")
        stages = self.stages_of("kronbert", seed=0)
        labelled = all(one.objective.label_tap for one in stages)
        if self.splice is None and labelled:
            object.__setattr__(self, "splice", 0)
        if labelled and (self.augment or self.splice or self.text_rows or self.transfer):
            raise DistillError(
                "augment, splice, text_rows, transfer: rows without labels, but every stage learns "
                "from labels. Drop the term 'labels' from one."
            )
        if self.reword and self.splice == 0:
            raise DistillError(f"reword={self.reword}: without splices, whose words it changes.")
        if self.layers is not None and self.start is not None:
            raise DistillError("layers: a student that goes on from another has its depth.")
        names = [stage.name for stage in stages]
        if len(set(names)) < len(names):
            raise DistillError(f"stages {names}: expected different names; one folder each.")
        if self.after is not None and (len(names) < 2 or len(self.rates) > 1):
            raise DistillError(
                f"after={self.after!r}: expected two stages or more, of which the last is trained, "
                f"and at most one rate; got stages {names}, rates {self.rates}."
            )

    def stages_of(self, kind: str, seed: int) -> list[Stage]:
        """The stages of one student. A dense one of another width has no terms on hidden states: in
        a stage of those alone it learns what the last stage does, so that it has as many steps."""
        found = []
        for given in self.stages:
            told = {**given, "seed": seed}
            if kind == "dense":
                kept = _answers(given) or _answers(self.stages[-1])
                if not kept:
                    raise DistillError(
                        f"stages: none has a term that a student of kind {kind!r} can have."
                    )
                objective = Objective.from_dict({"terms": kept})
                told["objective"] = objective.to_dict()
                # the same rows for every factor and seed
                told["cache_teacher"] = objective.teacher_taps == {"logits"}
            elif self.layers is not None:
                told["objective"] = {**given["objective"], "layer_map": "uniform"}
            found.append(Stage.from_dict(told))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def before_last(training: Mapping[str, Any]) -> dict[str, Any]:
    """Of `Training.to_dict`: what determines a student before its last stage, but for its rows."""
    same = ("init", "calibration_rows", "calibration_text", "start", "structure", "layers")
    return {"stages": training["stages"][:-1], **{name: training[name] for name in same}}


def completed(training: Mapping[str, Any]) -> dict[str, Any]:
    """`Training.to_dict` of an earlier time: a field that it lacks had its default."""
    known = {one.name: one.default for one in fields(Training) if one.default is not MISSING}
    return {**known, **training}


def _answers(stage: Mapping[str, Any]) -> list[Any]:
    return [term for term in stage["objective"]["terms"] if term["tap"] not in HIDDEN_TAPS]


def stages_of(task: str, tokens: int | None = None) -> tuple[dict[str, Any], ...]:
    """The stages of every student: the library's own recipe for a training set of so many tokens
    (None: GLUE's), as a `Stage`'s JSON has them."""
    stages = [stage.to_dict() for stage in task_stages(task, tokens=tokens)]
    for stage in stages:
        del stage["seed"]
    return tuple(stages)


def training_of(task: str, changes: Mapping[str, Any], tokens: int | None = None) -> Training:
    """The task's training, with ``changes``: fields of `Training`, or of its last stage. tokens: as
    for `stages_of`."""
    made = Training(stages=stages_of(task, tokens))
    known = [field.name for field in fields(Training)]
    staged = [field.name for field in fields(Stage) if field.name not in ("name", "seed")]
    for key in changes:
        if key not in known + staged:
            raise DistillError(f"--stage: unknown key {key!r}. {near(key, known + staged)}")
    made = replace(made, **{key: value for key, value in changes.items() if key in known})
    last = {**made.stages[-1], **{k: v for k, v in changes.items() if k in staged}}
    return replace(made, stages=(*made.stages[:-1], last))


def read_changes(given: str | None) -> dict[str, Any]:
    """The JSON object of --stage: its text, or the file that holds it."""
    if given is None:
        return {}
    text = given if given.lstrip().startswith("{") else Path(given).read_text()
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DistillError(f"--stage {given}: no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise DistillError(f"--stage {given}: expected an object, such as {{'epochs': 5}}.")
    return found


def teacher_of(task: str) -> dict[str, Any]:
    """The row of the teachers' table, whole."""
    return {"start": None, **TEACHER, **TEACHERS.get(task, {})}


def is_subset(source: str) -> bool:
    """Whether the rows are part of the task's own, or replace them, as their files' names say."""
    return any(word in source.lower() for word in ("subset", "derived", "custom"))
