"""Students of fewer layers in a job: the dense model whose shapes they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .depth import fewer_layers
from .errors import PlanError


def base_of(
    teacher: Any, layers: int | None, wanted: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The dense model of which a student is made, the teacher or some of its layers, and what is
    asked of it: ``wanted`` (factor, preset), whose factor counts against the teacher."""
    if layers is None:
        return teacher, dict(wanted)
    base = fewer_layers(teacher, layers)
    if wanted.get("factor") is None:
        return base, dict(wanted)
    factor = wanted["factor"] * base.num_parameters() / teacher.num_parameters()
    if factor <= 1:
        raise PlanError(
            f"layers={layers} leave {base.num_parameters():,} parameters, {wanted['factor']:g} "
            f"times smaller are {int(teacher.num_parameters() / wanted['factor']):,}. Ask for a "
            "larger factor, or for more layers."
        )
    return base, {**wanted, "factor": factor}


def at_depth(stage: Any) -> Any:
    """The `Stage`, for students of any depth: a layer learns from the one whose weights it has."""
    return replace(stage, objective=replace(stage.objective, layer_map="uniform"))
