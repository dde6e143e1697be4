"""How far a student answers as its teacher does, right or wrong.

A score counts how many answers are right; two students with one score can agree with their teacher
on very different shares of the rows, and a dev set of a few hundred rows tells scores apart badly.
Stanton et al. 2021, "Does Knowledge Distillation Really Work?", section 3: average top-1 agreement
and average predictive KL.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kronbert.errors import DistillError


def fidelity(student: Any, teacher: Any) -> dict[str, float]:
    """Both models' logits (rows, labels) on the same rows -> classes: the share of rows with the
    same most likely class, ``agreement``, and the mean KL(teacher || student), ``kl``, in nats; one
    logit (a regression): their ``correlation`` (Pearson's) and ``rmse``, in the labels' units.

    Raises `DistillError` unless the two have one shape of finite numbers."""
    a, z = (np.asarray(one, dtype=np.float64) for one in (student, teacher))
    if a.shape != z.shape or a.ndim != 2 or not a.size:
        raise DistillError(
            f"fidelity: logits of shapes {a.shape} and {z.shape}: expected (rows, labels) twice, "
            "of the same rows."
        )
    if not (np.isfinite(a).all() and np.isfinite(z).all()):
        raise DistillError("fidelity: NaN or infinity among the logits. Check both models.")
    if a.shape[1] == 1:
        rmse = float(np.sqrt(np.mean((a - z) ** 2)))
        spread = a.std() * z.std()
        if not spread:
            return {"correlation": 0.0, "rmse": rmse}
        shared = np.mean((a - a.mean()) * (z - z.mean()))
        return {"correlation": float(shared / spread), "rmse": rmse}
    log_a, log_z = _log_softmax(a), _log_softmax(z)
    kl = (np.exp(log_z) * (log_z - log_a)).sum(axis=1)
    agreement = a.argmax(axis=1) == z.argmax(axis=1)
    return {"agreement": float(agreement.mean()), "kl": float(kl.mean())}


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
