"""Recipes: how each paper trains its students, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kronbert.distill.numbers import plain
from kronbert.distill.objectives import known_keys
from kronbert.distill.stages import Stage
from kronbert.errors import DistillError, near


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in the order they are trained, each starting from the student of the one before.
    paper: where they come from. notes: what the paper leaves open. tokens_wanted: in the rows of
    stage 2; a smaller training set is filled up with rows made of two of its own (`splice`). 0: the
    training rows alone."""

    name: str
    paper: str
    stages: tuple[Stage, ...]
    notes: str = ""
    tokens_wanted: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "tokens_wanted", plain(self.tokens_wanted))
        if type(self.tokens_wanted) is not int or self.tokens_wanted < 0:
            raise DistillError(
                f"Recipe({self.name!r}, tokens_wanted={self.tokens_wanted!r}): expected a whole "
                "number >= 0."
            )
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise DistillError(
                f"Recipe({self.name!r}): expected stages with different names, got {names}."
            )

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        stages = {stage.name: stage for stage in self.stages}
        if name not in stages:
            raise DistillError(
                f"Recipe({self.name!r}) has no stage {name!r}. {near(str(name), list(stages))}"
            )
        return stages[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return {
            "name": self.name,
            "paper": self.paper,
            "stages": [stage.to_dict() for stage in self.stages],
            "notes": self.notes,
            "tokens_wanted": self.tokens_wanted,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; unknown keys are refused."""
        given = dict(known_keys(cls, data))
        return cls(**given | {"stages": tuple(Stage.from_dict(s) for s in given["stages"])})


def names() -> tuple[str, ...]:
    """What `get` knows."""
    from kronbert.distill.recipes.kroneckerbert import FACTORS

    return ("kronbert", *(f"kroneckerbert-{preset}" for preset in FACTORS))


def get(name: str) -> Recipe:
    """The recipe of that name: "kronbert", this library's own, or "kroneckerbert-k8"."""
    from kronbert.distill.recipes.kronbert import kronbert
    from kronbert.distill.recipes.kroneckerbert import kroneckerbert

    if name not in names():
        raise DistillError(f"recipe {name!r} is not known. {near(str(name), names())}")
    if name == "kronbert":
        return kronbert()
    return kroneckerbert(name.removeprefix("kroneckerbert-"))
