"""Ranks of blocks of rows: the law on its measurements, groups that make the table, no waste."""

from itertools import pairwise, product

import pytest

from kronbert.row_ranks import (
    CLOSENESS,
    EDGES,
    POWER,
    SIGN_RANK,
    SIGN_SHARE,
    edges_of,
    kept_part,
    row_ranks,
    shares_of,
)
from kronbert.shapes import check_groups, low_rank

BERT = (30522, 384)


def ranks_at(numbers):
    """The groups of MiniLM's table with at most so many numbers, and what they keep."""
    fitting = [x for x in row_ranks(*BERT) if sum(s.parameters for s in x[0]) <= numbers]
    return max(fitting, key=lambda x: x[1])


@pytest.mark.parametrize(("rank", "kept"), [(8, 0.11), (32, 0.29), (64, 0.46), (128, 0.66)])
def test_the_law_lies_on_the_rare_words_of_minilm(rank, kept):
    assert kept_part(rank, 384) == pytest.approx(kept, abs=0.03)


def test_the_law_at_its_ends():
    assert kept_part(0, 384) == 0.0
    assert kept_part(384, 384) == kept_part(500, 384) == 1.0


@pytest.mark.parametrize(("rows", "width"), [BERT, (50265, 768), (4096, 64)])
def test_every_step_makes_the_whole_table_and_keeps_more(rows, width):
    found = list(row_ranks(rows, width))
    for groups, kept in found:
        check_groups(groups, rows, width, "x", table=True)
        assert 0 < kept <= 1
    assert all(one < after for (_, one), (_, after) in pairwise(found))
    (last, kept) = found[-1]
    assert last == (low_rank(rows, width, width),)
    assert kept == pytest.approx(1)


def test_ranks_fall_with_frequency():
    for numbers in (600_000, 1_200_000, 2_000_000):
        groups, _ = ranks_at(numbers)
        first, _, *blocks = groups
        assert (first.start, first.out_features) == (0, 30522)
        assert [block.start for block in blocks] == list(edges_of(30522)[: len(blocks)])
        assert all(one.rank > after.rank for one, after in pairwise(blocks))


@pytest.mark.parametrize(("rows", "signs"), [(30522, SIGN_SHARE), (50265, 0.0)])
def test_what_is_kept_is_the_law_of_the_ranks_and_all_of_the_signs(rows, signs):
    edges = edges_of(rows)
    for groups, kept in row_ranks(rows, 64):
        ranks = [groups[0].rank] * 4
        for block in groups[1:]:
            if block.start in edges:
                ranks[1 + edges.index(block.start)] += block.rank
        words = kept_by(ranks, shares_of(rows), 64)
        assert kept == pytest.approx(signs + (1 - signs) * words)


@pytest.mark.parametrize("rows", [30522, 50265])
def test_half_of_the_numbers_are_every_rows(rows):
    edges = edges_of(rows)
    step = 384 + max(b - a for a, b in pairwise(edges))  # of a block, before the next for all rows
    for groups, _ in row_ranks(rows, 384):
        used = sum(shape.parameters for shape in groups)
        assert groups[0].parameters >= (used - step) / 2
    alone = [groups[0].rank for groups, _ in row_ranks(rows, 384, shared=0.0)]
    assert alone[100] == 1  # the law by itself leaves rare words next to nothing


def test_blocks_keep_more_than_one_rank_for_all_rows():
    numbers = 64 * (30522 + 384)
    _, kept = ranks_at(numbers)
    alike = kept_by([64] * 4, shares_of(30522), 384)
    assert kept > alike + 0.05


def test_bert_begins_with_rows_that_hold_no_words():
    """'!' is row 999, '~' 1066, 'the' 1996; between them lie other scripts, which get no block."""
    assert edges_of(30522)[0] == 1996
    assert edges_of(30522)[-1] == 1996 + round(EDGES[-1] * (30522 - 1996))
    assert edges_of(50265)[0] == 0
    assert edges_of(50265)[-1] == round(EDGES[-1] * 50265)
    assert sum(shares_of(30522)) == pytest.approx(1)


@pytest.mark.parametrize("width", [32, 384])
def test_signs_have_a_block_of_their_own_beside_the_rank_that_all_rows_share(width):
    for groups, _ in row_ranks(30522, width):
        signs = [shape for shape in groups if shape.start == 999]
        rank = min(SIGN_RANK, width - groups[0].rank)
        assert [(s.out_features, s.rank) for s in signs] == ([(68, rank)] if rank else [])
        covered = {row for s in groups[1:] for row in range(s.start, s.start + s.out_features)}
        assert covered.isdisjoint(range(1067, 1996))
    assert all(shape.start != 999 for groups, _ in row_ranks(50265, width) for shape in groups)


def test_a_small_table_has_no_blocks():
    assert not list(row_ranks(2047, 64))
    assert list(row_ranks(2048, 64))


@pytest.mark.parametrize(
    ("law", "half", "lost"),
    [({"power": POWER, "shared": 0.0}, 0.0, 0.005), ({}, 0.5, 0.01)],
    ids=["law", "planner"],
)
def test_the_path_is_as_good_as_any_ranks_of_its_size(law, half, lost):
    """Against all ranks on a grid, the planner's against those that give all rows half: adding one
    by one loses next to nothing."""
    rows, width = 4096, 32
    edges, shares = edges_of(rows), shares_of(rows)
    sizes = [rows - edges[-1] + edges[0], *(b - a for a, b in pairwise(edges))]
    grid = range(1, width + 1, 3)
    for numbers in (10_000, 30_000, 60_000):
        best = 0.0
        for ranks in product(grid, repeat=4):
            used = sum((size + width) * rank for size, rank in zip(sizes, ranks, strict=True))
            if used <= numbers and ranks[0] * (rows + width) >= half * used:
                best = max(best, kept_by(ranks, shares, width))
        path = row_ranks(rows, width, **law)
        fitting = [k for groups, k in path if sum(s.parameters for s in groups) <= numbers]
        assert max(fitting) > best - lost


def kept_by(ranks, shares, width):
    return sum(
        share * (1 - (1 - kept_part(rank, width)) ** close)
        for share, rank, close in zip(shares, ranks, CLOSENESS, strict=True)
    )


def test_ranks_are_shared_out_by_a_flatter_law_than_what_is_kept():
    flat = [groups for groups, _ in row_ranks(4096, 32, power=0.5)]
    assert [groups for groups, _ in row_ranks(4096, 32)] == flat
    assert [groups for groups, _ in row_ranks(4096, 32, power=0.75)] != flat
