"""More rows without a label: the beginning of one training row and the end of another."""

from __future__ import annotations

import random
from collections.abc import Iterator

import datasets

from kronbert.distill.data import TaskData
from kronbert.distill.text import ROWS_AT_ONCE
from kronbert.distill.unlabelled import text_table
from kronbert.errors import DataError

DRAWS = 10
"""Times as many pairs of rows are drawn as rows are wanted, at most: few rows make few others."""


def splice(data: TaskData, *, count: int, seed: int = 0, reword: float = 0.0) -> datasets.Dataset:
    """At most ``count`` rows for `with_unlabelled`, none twice and none of ``data.train``'s.

    Two rows are drawn, and a share in [0, 1): every text of the new row has that share of the
    first one's words (one at least), then what follows the same share of the second one's (one at
    least). The texts of a pair are cut alike, so that they stay about as like each other. Words
    are what stands between blanks: of a language without blanks two whole texts are joined.

    reword: the probability with which a word of a new row becomes another word of the training
    rows, any of them, the same one wherever it stands in the row: what was alike stays alike.

    A teacher knows its training rows by heart, and a student that learns from these, or from
    copies with a few words changed, learns them as well. It answers other rows as the teacher does
    less often."""
    if count < 1:
        raise DataError(f"splice(count={count}): expected a number of rows, 1 or more.")
    columns = data.task.text
    if missing := set(columns) - set(data.train.column_names):
        raise DataError(
            f"splice: no column {', '.join(sorted(missing))}: the rows are tokenised. Splice "
            "before tokenize."
        )
    if not 0 <= reword < 1:
        raise DataError(f"splice(reword={reword}): expected a probability, 0 or more, below 1.")
    if len(data.train) < 2:
        raise DataError(f"splice: {len(data.train)} training rows, expected 2 or more.")
    texts = data.train.select_columns(list(columns))
    draw = random.Random(seed)
    words = _words(texts, columns) if reword else []

    def drawn() -> Iterator[tuple[str, ...]]:
        for _ in range(0, DRAWS * count, ROWS_AT_ONCE):
            pairs = [draw.sample(range(len(texts)), 2) for _ in range(ROWS_AT_ONCE)]
            batch = texts[[place for pair in pairs for place in pair]]
            rows = list(zip(*(batch[name] for name in columns), strict=True))
            for first, second in zip(rows[::2], rows[1::2], strict=True):
                share = draw.random()
                made = tuple(map(_spliced, first, second, [share] * len(columns)))
                yield _reworded(made, words, reword, draw) if reword else made

    seen = set(zip(*(texts[name] for name in columns), strict=True))

    def new() -> Iterator[tuple[str, ...]]:
        left = count
        for row in drawn():
            if row not in seen:
                seen.add(row)
                yield row
                left -= 1
                if not left:
                    return

    table = text_table(data.task, new())
    if not len(table):
        raise DataError("splice: every splice of two training rows is a training row.")
    return table


def _spliced(first: str, second: str, share: float) -> str:
    start, end = first.split(), second.split()
    kept = max(1, round(share * len(start)))
    left_out = min(round(share * len(end)), len(end) - 1)
    return " ".join([*start[:kept], *end[left_out:]])


def _words(texts: datasets.Dataset, columns: tuple[str, ...]) -> list[str]:
    return sorted({word for name in columns for text in texts[name] for word in text.split()})


def _reworded(
    row: tuple[str, ...], words: list[str], share: float, draw: random.Random
) -> tuple[str, ...]:
    others: dict[str, str] = {}
    for word in (word for text in row for word in text.split()):
        if word not in others:
            others[word] = draw.choice(words) if draw.random() < share else word
    return tuple(" ".join(others[word] for word in text.split()) for text in row)
