"""`KroneckerConfig`: what a user asks of a conversion, checked on construction."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from .errors import NoMatchError, PlanError, ShapeError, near
from .presets import preset as find_preset
from .shapes import Groups, KroneckerShape, low_rank, parse_groups

SCHEMA = 1
"""Version of the JSON written by this file and by the checkpoint format."""

DEFAULT_KEEP = ("*classifier*", "*classification_head*", "*qa_outputs*", "score", "*.score")
"""Task heads are small and carry the task: dense unless a rule says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of the layers a rule names: exactly one field is set, else `PlanError`.

    dense: leave it. groups: these Kronecker shapes, summed. rank: a truncated SVD of that rank.
    factor: the best shape with at most weights / factor numbers.
    """

    dense: bool = False
    groups: Groups = ()
    rank: int | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        one = isinstance(self.groups, KroneckerShape)
        groups = (self.groups,) if one else self.groups
        if not isinstance(groups, list | tuple) or not all(
            isinstance(group, KroneckerShape) for group in groups
        ):
            raise PlanError(
                f"Rule(groups={groups!r}): expected KroneckerShapes. Text is read by "
                "Rule.parse('384x48*2x16')."
            )
        object.__setattr__(self, "groups", tuple(groups))
        given = (self.dense, bool(self.groups), self.rank is not None, self.factor is not None)
        if sum(given) != 1:
            raise PlanError(f"{self}: expected exactly one of dense, groups, rank and factor.")
        if self.rank is not None:
            check_rank(self.rank, "Rule")
        if self.factor is not None:
            object.__setattr__(self, "factor", check_factor(self.factor, "Rule"))

    @classmethod
    def parse(cls, value: Any, where: str = "rules") -> Rule:
        """From "dense", "384x48⊗2x16", a `KroneckerShape`, a list of those, {"rank": 4} or
        {"factor": 8}. ``where`` opens the message of the error anything else raises."""
        if isinstance(value, Rule):
            return value
        if value is None or value == "dense":
            return cls(dense=True)
        if isinstance(value, KroneckerShape):
            return cls(groups=(value,))
        if isinstance(value, str):
            try:
                return cls(groups=parse_groups(value))
            except ShapeError as error:
                raise ShapeError(f"{where}: {error}") from None
        if isinstance(value, Mapping) and len(value) == 1:
            ((key, given),) = value.items()
            if key == "rank":
                return cls(rank=check_rank(given, where))
            if key == "factor":
                return cls(factor=check_factor(given, where))
        elif isinstance(value, Sequence) and value:
            parts = [cls.parse(part, where) for part in value]
            if all(part.groups for part in parts):
                return cls(groups=tuple(shape for part in parts for shape in part.groups))
        raise PlanError(
            f"{where}: {value!r} is no rule. Expected 'dense', a shape such as '384x48⊗2x16', a "
            "list of shapes, {'rank': 4} or {'factor': 8}."
        )

    def to_json(self) -> Any:
        if self.dense:
            return "dense"
        if self.groups:
            return " + ".join(shape.spec for shape in self.groups)
        return {"rank": self.rank} if self.rank else {"factor": self.factor}

    def fixed(self, out: int, inner: int) -> Groups | None:
        """The groups this rule fixes for an (out, inner) weight; None: left to the search."""
        if self.dense:
            return ()
        if self.rank:
            return (low_rank(out, inner, self.rank),)
        return self.groups or None


@dataclass(frozen=True, kw_only=True)
class KroneckerConfig:
    """factor: parameters before / after, whole model (19 = nineteen times smaller); > 1.
    preset: k5, k8, k19 or k21 instead of a factor. Neither: only the rules convert.
    rules: module name -> `Rule`; a full name beats a ``re:`` pattern (the first that matches),
    which beats keep, which beats factor and preset.
    keep: names that stay dense, as `fnmatch` patterns or ``re:`` regular expressions.
    Raises `PlanError`."""

    factor: float | None = None
    preset: str | None = None
    rules: Mapping[str, Rule] = field(default_factory=dict)
    keep: tuple[str, ...] = DEFAULT_KEEP

    def __post_init__(self) -> None:
        if self.factor is not None and self.preset is not None:
            raise PlanError(
                f"factor={self.factor!r} and preset={self.preset!r}: expected one of them. "
                "A preset fixes every shape, so it fixes the factor too."
            )
        if self.factor is not None:
            object.__setattr__(self, "factor", check_factor(self.factor, "KroneckerConfig"))
        if self.preset is not None:
            find_preset(self.preset)
            object.__setattr__(self, "preset", self.preset.lower())
        listed = isinstance(self.keep or (), Iterable) and not isinstance(self.keep, str)
        keep = tuple(self.keep or ()) if listed else ()  # read once: it may be a generator
        if not listed or not all(isinstance(k, str) for k in keep):
            raise PlanError(
                f"keep={self.keep!r}: expected a list of patterns. For one layer: keep=['pooler*']."
            )
        object.__setattr__(self, "keep", keep)
        if not isinstance(self.rules, Mapping) or not all(isinstance(n, str) for n in self.rules):
            raise PlanError(
                f"rules={self.rules!r}: expected module names with what becomes of them, for "
                "example {'pooler.dense': 'dense'}."
            )
        rules = {name: Rule.parse(value, f"rules[{name!r}]") for name, value in self.rules.items()}
        object.__setattr__(self, "rules", rules)
        for pattern in (*rules, *self.keep):
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise PlanError(
                        f"{pattern!r} is no regular expression: {error}. Mend the pattern."
                    ) from error
        if self.factor is None and self.preset is None and not rules:
            raise PlanError(
                "nothing to convert: expected factor=, preset= or rules= (--factor, --preset, "
                "--rule). The paper's model: preset='k8'; nineteen times smaller: factor=19."
            )

    def rule(self, name: str) -> Rule | None:
        """The rule for a module: its full name, else the first matching pattern, else keep."""
        if name in self.rules:
            return self.rules[name]
        for pattern, rule in self.rules.items():
            if pattern.startswith("re:") and re.fullmatch(pattern[3:], name):
                return rule
        if any(matches(pattern, name) for pattern in self.keep):
            return Rule(dense=True)
        return None

    def keeps_alone(self, name: str, other: str) -> bool:
        """Whether a keep pattern of the user's covers this name but not the other."""
        own = [pattern for pattern in self.keep if pattern not in DEFAULT_KEEP]
        return any(matches(one, name) and not matches(one, other) for one in own)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `NoMatchError` for a rule, or a keep pattern of the user's, that names nothing."""
        for pattern in (*self.rules, *(k for k in self.keep if k not in DEFAULT_KEEP)):
            if pattern in self.rules and not pattern.startswith("re:"):
                found = pattern in names
            else:
                found = any(matches(pattern, name) for name in names)
            if not found:
                raise NoMatchError(
                    f"{pattern!r} matches no Linear or Embedding of the model. "
                    f"{near(pattern.removeprefix('re:'), tuple(names))} "
                    "For several layers use a pattern: 're:.*query'."
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "factor": self.factor,
            "preset": self.preset,
            "rules": {name: rule.to_json() for name, rule in self.rules.items()},
            "keep": list(self.keep),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KroneckerConfig:
        """From `to_json`; `PlanError` for an unknown key or a newer schema."""
        data = check_schema(data, ("factor", "preset", "rules", "keep"), "KroneckerConfig")
        return cls(**data)


def matches(pattern: str, name: str) -> bool:
    """Whether a keep pattern (``re:`` regular expression, else `fnmatch`) covers a full name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def check_rank(rank: Any, where: str) -> int:
    """``rank`` as a whole number >= 1, or `PlanError`."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise PlanError(
            f"{where}: rank={rank!r}: expected a whole number >= 1, the terms of a truncated SVD."
        )
    return rank


def check_factor(factor: Any, where: str) -> float:
    """``factor`` as a float > 1, or `PlanError`."""
    number = isinstance(factor, Real) and not isinstance(factor, bool)
    if not number or not 1 < factor <= sys.float_info.max:
        raise PlanError(
            f"{where}: factor={factor!r}: expected parameters before / after, a number > 1 "
            "(19 = nineteen times smaller). To leave the model dense, do not convert it."
        )
    return float(factor)


def check_schema(data: Mapping[str, Any], known: Sequence[str], where: str) -> dict[str, Any]:
    """``data`` without its schema version; refuses unknown keys and a newer schema."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: {data!r}: expected the dictionary that to_json gives.")
    version = data.get("schema", SCHEMA)
    if not isinstance(version, int) or version < 1:
        raise PlanError(f"{where}: schema {version!r}: expected a whole number, {SCHEMA} or less.")
    if version > SCHEMA:
        raise PlanError(
            f"{where}: schema {version!r} is newer than this kronbert knows ({SCHEMA}). "
            "Upgrade: pip install -U kronbert."
        )
    for key in data:
        if key not in (*known, "schema"):
            raise PlanError(f"{where}: unknown key {key!r}. {near(str(key), tuple(known))}")
    return {key: value for key, value in data.items() if key != "schema"}
