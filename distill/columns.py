"""What the columns of a table are, by their names and what stands in them."""

from __future__ import annotations

import math
import re
from typing import Any

from kronbert.distill.text import Table
from kronbert.errors import DataError

TEXT_COLUMNS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("text1", "text2"), ("question", "sentence"), ("sentence",), ("text",), ("review",),
    ("question",), ("content",),
)  # fmt: skip
LABEL_COLUMNS = ("label", "score", "labels", "target", "class")


def text_columns(table: Table) -> tuple[str, ...]:
    """The text columns by their names; a pair hides the single names inside it."""
    found: list[tuple[str, ...]] = []
    for names in TEXT_COLUMNS:
        if set(names) <= set(table.columns) and not any(set(names) <= set(f) for f in found):
            found.append(names)
    others = [name for name, values in table.columns.items() if _are_sentences(values)]
    if found == [("question",)] and len(others) > 1:  # of BoolQ the passage would be left out
        found += [("question", name) for name in others if name != "question"]
    if len(found) == 1:
        return found[0]
    reason = f"{' or '.join(map(str, found))} could be meant" if found else "no known text column"
    raise DataError(
        f"{table.path}: {reason}. It has {', '.join(map(repr, table.columns))}: pass "
        "text=('column',) or text=('first', 'second')."
    )


def label_column(table: Table) -> str:
    """The label's column by its name; `DataError` where there is none, or more than one."""
    found = [name for name in LABEL_COLUMNS if name in table.columns]
    if len(found) > 1:
        raise DataError(
            f"{table.path}: {' or '.join(map(repr, found))} could be meant: pass label=... "
            "(--label-column)."
        )
    return table.column(*LABEL_COLUMNS)


def _are_sentences(values: list[Any]) -> bool:
    return all(isinstance(v, str) for v in values) and any(len(v.split()) > 3 for v in values)


def refuse_scores_without_number(tables: list[Table], column: str) -> None:
    """Where most labels are numbers with a point (or a comma), the others are no classes."""
    labels = [(table, row, v) for table in tables for row, v in enumerate(table.columns[column])]
    scores = sum(_is_score(str(value)) for _, _, value in labels)
    for table, row, value in labels if 2 * scores > len(labels) else ():
        if not are_numbers([value]):
            raise DataError(
                f"{table.where(row)}: label {value!r} in column {column!r}: expected a number, "
                "with a point, as most labels are. Correct or remove the row; for classes pass "
                "regression=False (--classes)."
            )


def _is_score(text: str) -> bool:
    return re.fullmatch(r"\s*[-+]?\d*[.,]\d+\s*", text) is not None


def are_numbers(values: list[Any]) -> bool:
    try:
        return all(math.isfinite(float(v)) for v in values)
    except (TypeError, ValueError):
        return False


def have_points(values: list[Any]) -> bool:
    return any("." in str(v) or not float(v).is_integer() for v in values)


def by_size(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name
