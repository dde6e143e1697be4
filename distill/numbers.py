"""Numbers in the settings of a training: Python's own, whatever library they come from."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """A number of NumPy's as Python's, which JSON knows; anything else as it is."""
    if isinstance(value, bool) or type(value) in (int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def is_number(value: Any) -> bool:
    """Whether ``value`` can be compared with numbers and is none of True and False."""
    return isinstance(value, Real) and not isinstance(value, bool)
