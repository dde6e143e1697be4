"""KroneckerBERT (Tahaei et al., arXiv 2109.06243, NAACL 2022): both training stages."""

from __future__ import annotations

from math import log

from kronbert.distill.objectives import Objective, Term
from kronbert.distill.recipes import Recipe
from kronbert.distill.stages import Stage
from kronbert.distill.tasks import plain_name
from kronbert.errors import DistillError, near

# Compression of each preset: KroneckerBERT Table 1; k19 is the first arXiv version's abstract.
FACTORS: dict[str, float] = {"k5": 5.5, "k8": 7.8, "k19": 19.0, "k21": 21.0}

# Best stage-2 learning rates of the search over {5e-5, 1e-4, 5e-4} (paper, appendix), K8 and K21,
# and the tasks that differ. The paper has no rates for K5 and K19.
_RATES = {"k8": 1e-4, "k21": 5e-4}
_TASK_RATES = {
    ("k8", "cola"): 5e-5,
    ("k8", "rte"): 1e-5,
    ("k21", "qqp"): 1e-4,
    ("k21", "rte"): 5e-5,
}

_INTERMEDIATE = (Term(tap="embedding"), Term(tap="scores"), Term(tap="ffn"))


def general_objective(*, mlm: bool = True) -> Objective:
    """Stage 1: Eq. 14 with masked words for its last two terms: embedding + scores + ffn + mlm,
    weights 1. mlm=False for a student without the head. The paper's next-sentence term is absent.
    """
    return Objective(terms=(*_INTERMEDIATE, Term(tap="mlm")) if mlm else _INTERMEDIATE)


def task_objective() -> Objective:
    """Stage 2, Eq. 14: embedding + scores + ffn + logits + labels, all weights 1.
    The paper does not say which loss the logits have; mean squared error, like the other terms."""
    return Objective(terms=(*_INTERMEDIATE, Term(tap="logits"), Term(tap="labels")))


def kroneckerbert(
    factor_or_preset: float | str, *, task: str | None = None, mlm: bool = True
) -> Recipe:
    """Both stages for a preset ("k5", "k8", "k19", "k21") or a compression ratio > 1.

    Stage 1: learning rate 1e-3, 3 epochs of 10 % of English Wikipedia, batch 64 (text; the appendix
    says 32), 512 tokens. Stage 2: 1e-4 (K8) or 5e-4 (K21), batch 32, 128 tokens, 5-15 epochs, CoLA
    15-30: the middle of each range is used. A ratio takes the rates of K8 or K21, whichever is
    nearer on a log scale. task: a GLUE name, for the paper's own rate. Not in the paper, so library
    defaults: warm-up, weight decay, schedule, clipping.
    """
    factor = _factor(factor_or_preset)
    like = min(_RATES, key=lambda name: abs(log(FACTORS[name] / factor)))
    word = plain_name(task) if task else ""
    general = Stage(
        name="general",
        objective=general_objective(mlm=mlm),
        learning_rate=1e-3,
        epochs=3,
        batch_size=64,
        max_length=512,
    )
    on_task = Stage(
        name="task",
        objective=task_objective(),
        learning_rate=_TASK_RATES.get((like, word), _RATES[like]),
        epochs=22 if word == "cola" else 10,
        batch_size=32,
        max_length=128,
    )
    label = factor_or_preset if isinstance(factor_or_preset, str) else f"{factor:g}x"
    return Recipe(
        name=f"kroneckerbert-{label.lower()}",
        paper="arXiv 2109.06243 (NAACL 2022)",
        stages=(general, on_task),
        notes=f"Learning rates of {like.upper()}. AdamW for the paper's BertAdam. No augmentation.",
    )


def _factor(factor_or_preset: float | str) -> float:
    if isinstance(factor_or_preset, str):
        if factor_or_preset.lower() not in FACTORS:
            raise DistillError(
                f"preset {factor_or_preset!r} is not known. {near(factor_or_preset, list(FACTORS))}"
            )
        return FACTORS[factor_or_preset.lower()]
    if not 1 < factor_or_preset < float("inf"):
        raise DistillError(
            f"kroneckerbert({factor_or_preset!r}): expected parameters before / after, > 1, or a "
            "preset."
        )
    return float(factor_or_preset)
