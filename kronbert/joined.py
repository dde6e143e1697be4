"""Layers whose weights transformers joins when it saves a model, such as Nomic's query and key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .errors import PlanError


def refuse_joined(model: Any, names: Iterable[str]) -> None:
    """Raise `PlanError` for the first of these layers of a transformers model that would be saved
    as a part of another: matrices of a student put one below the other are no weight."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # before 5.17, which joins none
        return
    given = getattr(model, "_weight_conversions", None)
    if given is None:
        given = get_model_conversion_mapping(model, add_legacy=False)
    patterns = [
        pattern
        for one in given
        if isinstance(one, WeightConverter)
        for pattern in one.reverse_transform().source_patterns
    ]
    for name in names:
        if any(re.search(pattern, f"{name}.a") for pattern in patterns):
            dense = [f"*{pattern}" for pattern in patterns]
            raise PlanError(
                f"{name!r}: transformers saves its weight as a part of another layer's, from which "
                f"a student could not be loaded. Keep such layers dense: keep={dense!r}."
            )
