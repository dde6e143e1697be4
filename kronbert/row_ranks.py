"""How many terms the rows of a word table get: frequent words more. Pure arithmetic.

Word pieces lie in their vocabulary roughly by frequency, and a text consists mostly of the first
few thousand. A truncated SVD gives all rows one rank; here blocks of rows get ranks of their own,
on top of one that all rows share (Chen et al. 2018, GroupReduce; Baevski and Auli 2019, section 3).
At 1.49 M numbers for MiniLM's 30,522 x 384 table (one truncated SVD: rank 48) the lost part of its
output, over the words of English Wikipedia, falls from 0.50 to 0.26, and over those of the
training sets of SST-2, MRPC, RTE, CoLA and STS-B from 0.52-0.56 to 0.26-0.32
(examples/results/tables.json).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from .shapes import Groups, KroneckerShape, low_rank

SIGNS = {30522: (999, 1067)}
"""Rows of a vocabulary -> where those of punctuation, digits and letters begin and end. A sixth to
a fifth of the tokens of GLUE's training sets, in 68 rows of BERT's uncased vocabulary."""

SIGN_RANK, SIGN_SHARE = 48, 0.05
"""Of the signs' block, and their part of the text, flattened as by `POWER` (measured: English
Wikipedia 0.046, training sets 0.045 to 0.059). Beside rank 10 for all rows 0.17 / 0.05 / 0.02 /
0.005 of MiniLM's signs are lost with 0 / 20 / 34 / 50 of their own."""

FIRST_WORD = {30522: 1996}
"""Rows of a vocabulary -> its first row that holds a word. BERT's uncased one begins with 999 rows
of which five are ever read; behind the signs come 929 characters of other scripts, at most 0.06 %
of the tokens of GLUE's training sets."""

EDGES = (0.0, 1 / 40, 1 / 12, 1 / 4)
"""Where blocks begin and end, as parts of the rows that hold words; the rest has no block. With
0, 1/15, 1/6, 3/8 MiniLM's table of 0.62 M numbers loses 0.410 of its output on English Wikipedia,
with these 0.394; at 1.58 M 0.250 and 0.242."""

OFFSET, POWER = 50.0, 0.75
"""Word i from the first on counts (i + OFFSET) ** -POWER times, flatter than it occurs: rare words
carry more of a sentence's meaning than of its length. English Wikipedia's counts to the power
0.75, times the squared length of each row of MiniLM's table, lie 0.26 / 0.20 / 0.23 in the three
blocks, the law's 0.24 / 0.16 / 0.20."""

FLAT_POWER = 0.5
"""What takes `POWER`'s place where ranks are shared out among the blocks: words count flatter still
than for what is kept. Students of equal size after equal short training, with blocks of rows from
the first sign on (edges 0, 1/15, 1/6, 3/8; offset 200), by 0.75 / 0.5 / 0.25: KL of their answers
from the teacher's at 8 times compression, MRPC 0.217 / 0.195 / 0.223, PAWS 0.209 / 0.145 / 0.148;
hidden states off at 19 times, SST-2 1.020 / 1.016 / 1.022, IMDb 1.184 / 1.158 / 1.268, MRPC 1.125 /
1.103 / 1.182, PAWS 1.422 / 1.379 / 1.489 (examples/results/structures.json). One rank for all: MRPC
1.382, PAWS 1.648."""

SHARED = 0.5
"""Of a table's numbers at least, what the rank that all rows share takes, whatever the law says.
MiniLM's table at 19 times compression had rank 1 by the law alone, so that a rare word had next to
no vector. With rank 10 for all rows, blocks from the first sign on, the whole recipe took SST-2 to
86.8 (two seeds by the law alone: 85.7 and 86.4), KL of the answers from the teacher's 0.133 (0.151
and 0.167), IMDb to 78.1 (76.9 and 73.7), CoLA to 26.4 (23.5), KL 0.164 (0.183). By i ** -0.25,
which gives all rows half as well, SST-2 to 86.7, 0.135, 78.0; MRPC's F1 to 81.1 (80.4), KL 0.273
(0.267), PAWS to 60.5 (59.3) (examples/results/glue_study.json, `from-signs`, `law-alone` and
`flat-table`). Since blocks begin at the words it is 9, and answers are as near.
At 8 times compression of MiniLM and 19 of BERT-base the law gives half by itself."""

CLOSENESS = (1.0, 1.65, 1.25, 1.07)
"""What is lost of a truncated SVD's law, to this power, is lost in each part: the most frequent
words lie closer together. Kept of MiniLM's first block at rank 64 / 128 / 256: 0.64 / 0.83 / 0.97,
law 0.64 / 0.83 / 0.97; of the second 0.53 / 0.74 / 0.94, law 0.54 / 0.74 / 0.93; of the rows
without a block 0.46 / 0.66 / 0.89, law 0.46 / 0.66 / 0.88."""

SMALLEST = 2048
"""Rows below which a table gets no blocks."""


def kept_part(rank: int, width: int) -> float:
    """Of a table's squared output, by a truncated SVD; fitted to MiniLM's, see `search`."""
    if not rank:
        return 0.0
    ratio = width / min(rank, width)
    return math.exp(-(0.27 + 0.065 * math.log2(ratio)) * math.log(ratio))


def edges_of(rows: int) -> tuple[int, ...]:
    """The rows at which blocks begin, and where the last one ends."""
    first = FIRST_WORD.get(rows, 0)
    return tuple(first + round(edge * (rows - first)) for edge in EDGES)


def shares_of(rows: int, power: float = POWER) -> tuple[float, ...]:
    """Of the words of a text, flattened: what lies in no block, then the blocks."""
    edges = edges_of(rows)

    def until(row: int) -> float:
        return float((row - edges[0] + OFFSET) ** (1 - power))

    whole = until(rows) - until(edges[0])
    blocks = [(until(b) - until(a)) / whole for a, b in pairwise(edges)]
    return (1 - sum(blocks), *blocks)


def row_ranks(
    rows: int, width: int, power: float = FLAT_POWER, shared: float = SHARED
) -> Iterator[tuple[Groups, float]]:
    """Groups of a (rows, width) table, one rank of one block more each time, and the predicted part
    of its output that is kept: of words that count by `POWER`, and of signs all. Each step adds to
    the rank that all rows share while that has less than ``shared`` of the numbers, and else the
    rank that keeps most per number, of words that count by ``power``."""
    if rows < SMALLEST:
        return
    edges, shares, flat = edges_of(rows), shares_of(rows), shares_of(rows, power)
    signs = SIGN_SHARE if rows in SIGNS else 0.0
    sizes = [b - a for a, b in pairwise(edges)]
    sizes = [rows - sum(sizes), *sizes]
    ranks = [1] + [0] * (len(sizes) - 1)
    while True:
        # A block has at least the rank that all rows share, of which it pays nothing.
        whole = [max(rank, ranks[0]) for rank in ranks]
        kept = [_kept(rank, width, close) for rank, close in zip(whole, CLOSENESS, strict=True)]
        words = sum(share * part for share, part in zip(shares, kept, strict=True))
        groups = _groups(rows, width, edges, whole)
        yield groups, signs + (1 - signs) * words
        gains = [
            share * (_kept(rank + 1, width, close) - now) / (size + width)
            for share, rank, now, size, close in zip(
                flat, whole, kept, sizes, CLOSENESS, strict=True
            )
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        if groups[0].parameters < shared * sum(shape.parameters for shape in groups):
            best = 0
        if whole[best] >= width or gains[best] <= 0:
            return
        ranks[best] = whole[best] + 1


def _kept(rank: int, width: int, close: float) -> float:
    return 1.0 - (1.0 - kept_part(rank, width)) ** close


def _groups(rows: int, width: int, edges: tuple[int, ...], ranks: list[int]) -> Groups:
    shared, *others = ranks
    blocks = (
        KroneckerShape(after - start, 1, 1, width, rank - shared, start)
        for (start, after), rank in zip(pairwise(edges), others, strict=True)
        if rank > shared
    )
    return (low_rank(rows, width, shared), *_signs(rows, width, shared), *blocks)


def _signs(rows: int, width: int, shared: int) -> Groups:
    first, end = SIGNS.get(rows, (0, 0))
    rank = min(SIGN_RANK, width - shared)
    return (KroneckerShape(end - first, 1, 1, width, rank, first),) if end and rank else ()
