"""The students that the GLUE study compares: every kind at one parameter count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from study_settings import FITTED, STAGE1  # type: ignore[import-not-found]
from study_starts import by_importance  # type: ignore[import-not-found]
from study_structures import products, restructured  # type: ignore[import-not-found]
from transformers import AutoModelForSequenceClassification, BertConfig

import kronbert
from kronbert.config import Rule
from kronbert.embedding import KroneckerEmbedding
from kronbert.errors import DataError
from kronbert.job_begin import row_batches
from kronbert.job_models import open_model
from kronbert.job_start import Start, find_start, student_from
from kronbert.linear import KroneckerLinear
from kronbert.planning import LayerSize, Plan
from kronbert.search import Candidate, svd_rank
from kronbert.shapes import low_rank

BUCKETS = 4000
"""Slices of the budget in which `single_products` keeps the best mix."""


def stage1_start(
    asked: str | None, teacher: Any, tokenizer: Any, factor: float, kind: str
) -> Start | None:
    """The student of general text that the kind goes on from: in a folder of ``asked``, or one that
    comes with kronbert. None: the kind starts from the teacher.

    asked: holds 8/, 19/, ... as save_pretrained or pretrain-student wrote them, and for the kind
    svd-stage1 8-svd/, ..."""
    if kind not in STAGE1:
        return None
    name = f"{factor:g}-svd" if kind == "svd-stage1" else f"{factor:g}"
    place = Path(str(asked), name)
    if place.is_dir():
        inner = place / "student"
        source = str(inner if inner.is_dir() else place)
        return find_start(source, teacher, tokenizer, factor, None)
    found = None
    if asked is None and kind == "kronbert-stage1":
        found = find_start(None, teacher, tokenizer, factor, None)
    if found is None:
        raise DataError(f"kind {kind!r}: expected {name} in --stage1, got {asked!r}.")
    return found


def is_fitted(kind: str, init: str) -> bool:
    """Whether students of the kind start from a fit to data; init: `Training`'s, the kind
    kronbert's own."""
    return kind in FITTED and not (kind == "kronbert" and init == "weights")


def build(
    kind: str,
    teacher: Any,
    factor: float,
    start: Start | None,
    calibration: list[Any] | None,
    structure: str = "planned",
    importance: bool = False,
    layers: int | None = None,
) -> Any:
    """A student of ``teacher``; calibration: batches for a fit to data, None for the weights.
    Of the kind kronbert: structure, see `study_structures`; importance, whether outputs count by
    it (`study_starts.by_importance`). layers: how many it has, None: the teacher's."""
    if layers is not None and (start is not None or kind == "dense"):
        raise DataError(f"layers={layers}: students of kind {kind!r} have a depth of their own.")
    if start is not None:
        return student_from(start, teacher, factor=factor)
    if layers is not None:
        whole, teacher = teacher.num_parameters(), kronbert.fewer_layers(teacher, layers)
        factor *= teacher.num_parameters() / whole
    plan = kronbert.plan(teacher, factor=factor, errors=False)
    if kind == "kronbert":
        plan = restructured(plan, structure)
    if kind == "dense":
        return two_layers(teacher, plan.parameters)
    if kind in ("svd", "svd-fitted"):
        plan = all_svd(plan)
    elif kind in ("paper", "paper-fitted"):
        plan = single_products(plan)
    elif kind not in ("kronbert", "random"):
        raise DataError(f"student {kind!r}: no such kind.")
    if kind in FITTED and calibration is not None:
        if kind == "kronbert" and importance:
            return by_importance(teacher, plan, calibration)
        return kronbert.convert(teacher, plan=plan, init="data", calibration=calibration)
    student = kronbert.convert(teacher, plan=plan)
    if kind == "random":
        randomise(student)
    return student


def all_svd(plan: Plan) -> Plan:
    """Truncated SVDs with the numbers that ``plan`` gives each layer, less than a rank apart.

    What the ranks' rounding leaves over is spread rank by rank, first where one costs least."""
    free = [layer for layer in plan.converted if not layer.size.tied_to]
    ranks = {
        layer.size.name: svd_rank(layer.size.out, layer.size.inner, layer.weights).rank
        for layer in free
    }
    sizes = {layer.size.name: layer.size for layer in free}

    def edited() -> Plan:
        return plan.edit({n: low_rank(s.out, s.inner, ranks[n]) for n, s in sizes.items()})

    left = plan.parameters - edited().parameters
    order = sorted(free, key=lambda layer: layer.size.out + layer.size.inner)
    while left >= order[0].size.out + order[0].size.inner:
        before = left
        for size in (layer.size for layer in order):
            if size.out + size.inner <= left and ranks[size.name] < min(size.out, size.inner):
                ranks[size.name] += 1
                left -= size.out + size.inner
        if left == before:
            break  # every layer that could take a rank has its full one
    return edited()


def single_products(plan: Plan) -> Plan:
    """One Kronecker product per layer and a ``1 x n`` embedding, as large as ``plan`` allows.

    As in KroneckerBERT, layers of one size and group share their shape; what is left of the budget
    then goes to single layers. Shapes keep half of a layer's matrix rank, as the paper's do."""
    free = [layer for layer in plan.converted if not layer.size.tied_to]
    classes: dict[tuple[str, str, int, int], list[LayerSize]] = {}
    for layer in free:
        size = layer.size
        classes.setdefault((size.group, size.kind, size.out, size.inner), []).append(size)
    depth = max(1, sum(layer.size.group in ("attention", "feed-forward") for layer in free) // 6)
    options = {key: products(members[0]) for key, members in classes.items()}
    budget = sum(layer.weights for layer in free)
    mixes: list[tuple[int, float, tuple[Candidate, ...]]] = [(0, 0.0, ())]
    for key, members in classes.items():
        vote = depth if key[1] == "embedding" else len(members)
        best: dict[int, tuple[int, float, tuple[Candidate, ...]]] = {}
        for used, loss, picks in mixes:
            for one in options[key]:
                total = used + len(members) * one.weights
                mix = (total, loss + vote * one.loss, (*picks, one))
                place = total * BUCKETS // budget
                if total <= budget and (place not in best or mix[1] < best[place][1]):
                    best[place] = mix
        mixes = list(best.values())
    if not mixes:
        raise DataError("kind 'paper': no single products are this small. Leave this factor out.")
    used, _, picks = min(mixes, key=lambda mix: mix[1])
    chosen = {s.name: pick for m, pick in zip(classes.values(), picks, strict=True) for s in m}
    left = budget - used
    for key, members in classes.items():
        for size in members:
            larger = [c for c in options[key] if c.weights - chosen[size.name].weights <= left]
            best_one = max(larger, key=lambda c: c.weights)
            if best_one.weights > chosen[size.name].weights:
                left -= best_one.weights - chosen[size.name].weights
                chosen[size.name] = best_one
    return plan.edit({name: list(one.groups) or "dense" for name, one in chosen.items()})


@torch.no_grad()
def randomise(student: Any) -> None:
    """Every number as a new model of this configuration would have it."""
    spread = student.config.initializer_range
    for module in student.modules():
        if isinstance(module, KroneckerEmbedding):
            module.reset_parameters()  # a table of variance 1, where BERT has spread squared
            for letter in "ab":
                for matrix in module.matrices(letter):
                    matrix.mul_(spread**0.5)
        elif isinstance(module, KroneckerLinear):
            module.reset_parameters()
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.normal_(std=spread)
            bias = getattr(module, "bias", None)
            if bias is not None:
                torch.nn.init.zeros_(bias)


def two_layers(teacher: Any, budget: int) -> Any:
    """A dense BERT of two layers with at most ``budget`` parameters.

    Of the widths within 6 % of the widest that fits, the one with the most heads (at most 12); its
    feed-forward width, four times the model's or more, uses up the budget."""
    base = teacher.config
    fitting = [
        (heads, width)
        for heads in (1, 2, 3, 4, 6, 8, 12)
        for width in range(heads, base.hidden_size, heads)
        if parameters_of(base, width, 4 * width) <= budget
    ]
    if not fitting:
        raise DataError(f"kind 'dense': {budget:,} parameters hold no model of two layers.")
    widest = max(width for _, width in fitting)
    heads, width = max((h, w) for h, w in fitting if w >= 0.94 * widest)
    wide = 4 * width + (budget - parameters_of(base, width, 4 * width)) // (2 * (2 * width + 1))
    changes = {
        "hidden_size": width,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
    }
    config = BertConfig(**{**base.to_diff_dict(), **changes})
    return AutoModelForSequenceClassification.from_config(config)


def parameters_of(base: Any, h: int, f: int) -> int:
    """Of a BERT of two layers, h wide with f in the feed-forward, and a head like ``base``'s."""
    tables = (base.vocab_size + base.max_position_embeddings + base.type_vocab_size) * h
    layer = 4 * (h * h + h) + 2 * h * f + f + h + 4 * h
    return int(tables + 2 * h + 2 * layer + h * h + h + base.num_labels * (h + 1))


def continued(teacher: Any, folder: Path) -> Any:
    """A student for ``teacher``'s task that goes on from another task's, saved in ``folder``: its
    shapes and encoder, pooler included; the head is the teacher's, or new in a dense one."""
    learnt: Any = open_model(str(folder)).float()
    plan = getattr(learnt, "kronecker_plan", None)
    if plan is None:
        names = {"num_labels", "id2label", "label2id", "problem_type"}
        own = {k: v for k, v in teacher.config.to_dict().items() if k in names}
        config = BertConfig(**{**learnt.config.to_diff_dict(), **own})
        student = AutoModelForSequenceClassification.from_config(config)
    else:
        rules = {layer.size.name: Rule(groups=layer.groups) for layer in plan.converted}
        student = kronbert.convert(teacher, rules=rules, keep=())
    student.base_model.load_state_dict(learnt.base_model.state_dict())
    return student


def calibration(
    rows: Any, count: int, seed: int, tokenizer: Any, text: Any = ()
) -> list[dict[str, Any]]:
    """``count`` tokenised rows in batches, drawn with ``seed``, in turn with those of ``text``."""
    drawn = row_batches(rows, count, seed, tokenizer)
    more = row_batches(text, len(text), seed, tokenizer) if len(text) else []
    return list(_alternate(drawn, more))


def _alternate(first: Iterable[Any], second: Iterable[Any]) -> Iterator[Any]:
    sources = [iter(first), iter(second)]
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def shapes_of(student: Any) -> dict[str, str]:
    """Group and size of the converted layers -> their shapes, the different ones."""
    plan = getattr(student, "kronecker_plan", None)
    found: dict[str, list[str]] = {}
    for layer in plan.converted if plan else ():
        key = f"{layer.size.group} {layer.size.out}x{layer.size.inner}"
        spec = " + ".join(shape.spec for shape in layer.groups)
        if spec not in found.setdefault(key, []):
            found[key].append(spec)
    return {key: ", ".join(specs) for key, specs in found.items()}
