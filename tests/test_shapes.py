"""`KroneckerShape`: counts, FLOPs of either order against the paper's table, text forms, errors."""

import pytest

from kronbert.errors import KronbertError, ShapeError
from kronbert.shapes import (
    KroneckerShape,
    check_groups,
    dense_flops,
    divisors,
    low_rank,
    near_divisors,
    parse_groups,
    table_starts,
)

# papers.md 1.3 and 1.4: weights, FLOPs per token b first and a first.
PAPER = [
    ("384x384*2x2", 147_460, 591_360, 591_360),  # K8 attention
    ("8x2*384x384", 147_472, 598_272, 2_365_440),  # K8 feed-forward 1
    ("2x8*384x384", 147_472, 2_367_744, 600_576),  # K8 feed-forward 2
    ("384x48*2x16", 18_464, 75_936, 607_488),  # K21 attention
    ("16x2*192x384", 73_760, 303_744, 2_374_656),  # K21 feed-forward 1
    ("2x16*384x192", 73_760, 2_376_960, 306_048),  # K21 feed-forward 2
    ("384x384*8x2", 147_472, 2_365_440, 598_272),  # K5 feed-forward 1, one term
    ("384x384*2x8", 147_472, 600_576, 2_367_744),  # K5 feed-forward 2, one term
    ("30522x48*1x16", 1_465_072, None, None),  # K21 embedding
    ("30522x96*1x8", 2_930_120, None, None),  # K8 embedding
]


@pytest.mark.parametrize(("text", "weights", "b_first", "a_first"), PAPER)
def test_counts_are_the_papers(text, weights, b_first, a_first):
    shape = KroneckerShape.parse(text)
    assert shape.parameters == weights
    if b_first is not None:
        assert (shape.flops("b"), shape.flops("a")) == (b_first, a_first)
        assert shape.flops() == min(b_first, a_first)
        assert shape.order == ("b" if b_first <= a_first else "a")


def test_dense_flops_are_the_papers():
    assert (dense_flops(768, 768), dense_flops(3072, 768)) == (1_178_880, 4_715_520)


def test_terms_add_their_counts_and_their_sums():
    one, four = KroneckerShape(6, 5, 7, 4), KroneckerShape(6, 5, 7, 4, rank=4)
    assert four.parameters == 4 * one.parameters
    assert four.flops("a") == 4 * one.flops("a") + 3 * 42
    assert (four.out_features, four.in_features) == (42, 20)


@pytest.mark.parametrize(
    ("text", "rank"), [("384x384*2x2", 4), ("8x2*384x384", 16), ("384x48*2x16", 32)]
)
def test_full_rank(text, rank):
    assert KroneckerShape.parse(text).full_rank == rank


def test_truncated_svd_is_a_member():
    shape = low_rank(30, 20, 7)
    assert shape.low_rank
    assert shape.parameters == 7 * (30 + 20)
    assert shape.full_rank == 20
    assert str(shape) == "svd(7) 30x20"
    assert not KroneckerShape(30, 2, 1, 10).low_rank
    assert not KroneckerShape(15, 1, 2, 20).low_rank


@pytest.mark.parametrize(
    "text", ["384x48*2x16", "4:384x48*2x16", "17:30x1*1x20", "64:2001x1*1x384@999", "5x4*2x3@7"]
)
def test_spec_round_trip(text):
    assert KroneckerShape.parse(text).spec == text


def test_parse_reads_what_is_printed():
    shape = KroneckerShape(384, 48, 2, 16, 4)
    assert str(shape) == "4·384x48⊗2x16"
    assert KroneckerShape.parse(f" {shape} ") == shape
    assert parse_groups("4:384x48*2x16 + 3:768x1*1x768") == (shape, low_rank(768, 768, 3))


@pytest.mark.parametrize(
    "text", ["", "768", "384x48", "384x48*2x16*2x2", "-1x2*3x4", "a x b", "5x4*2x3@", "5x4@7*2x3"]
)
def test_parse_refuses(text):
    with pytest.raises(ShapeError, match="is no Kronecker shape: expected 'a_out x a_in"):
        KroneckerShape.parse(text)


@pytest.mark.parametrize("size", [0, -3, 2.0, True, "8", None])
def test_sizes_are_whole_numbers(size):
    with pytest.raises(ShapeError, match=r"KroneckerShape\(b_in=.*expected a whole number >= 1"):
        KroneckerShape(2, 3, 4, size)


@pytest.mark.parametrize("start", [-1, 2.0, True, None])
def test_a_start_is_a_row(start):
    with pytest.raises(ShapeError, match=r"KroneckerShape\(start=.*expected a row, 0 or more"):
        KroneckerShape(2, 3, 4, 5, start=start)


BLOCKS = "2:23x1*1x12 + 3:5x4*1x3@18 + 9x1*1x12 + 23x2*1x6"


def test_blocks_of_rows_are_read_as_they_are_printed():
    groups = parse_groups(BLOCKS)
    assert " + ".join(shape.spec for shape in groups) == BLOCKS
    assert [shape.start for shape in groups] == [0, 18, 0, 0]
    assert str(groups[1]) == "3·5x4⊗1x3@18"
    assert KroneckerShape.parse(str(groups[1])) == groups[1]
    assert str(KroneckerShape(5, 1, 1, 12, 3, 18)) == "svd(3) 5x12@18"
    check_groups(groups, 23, 12, "x", table=True)
    assert table_starts(groups, 23) == (0, 18, 0, 0)
    assert table_starts((groups[0], groups[3]), 23) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5x1*1x12 + 23x1*1x12", "x: a_out=5 does not divide out_features=23"),
        ("22x1*1x12@1 + 23x1*1x12", r"22x12@1 starts at row 1: expected 0. Only the second and"),
        ("23x1*1x12 + 5x1*1x12@19", "makes rows 19 to 23 of 12 numbers, expected rows up to 22 of"),
        ("23x1*1x12 + 23x1*1x12@1", "makes rows 1 to 23 of 12 numbers"),
        ("23x1*1x12 + 5x1*1x6@3", "makes rows 3 to 7 of 6 numbers, expected rows up to 22 of 12"),
        ("23x1*1x12 + 46x1*1x12", "a_out=46 does not divide out_features=23"),
    ],
)
def test_blocks_that_do_not_lie_in_the_table(text, said):
    with pytest.raises(ShapeError, match=said):
        check_groups(parse_groups(text), 23, 12, "x", table=True)


def test_only_tables_have_blocks():
    with pytest.raises(ShapeError, match=r"x: .*@18 starts at row 18: expected 0"):
        check_groups(parse_groups(BLOCKS), 23, 12, "x")
    with pytest.raises(ShapeError, match="a_out=5 does not divide out_features=23"):
        check_groups(parse_groups("23x1*1x12 + 5x1*1x12"), 23, 12, "x")


def test_a_shape_that_does_not_divide_names_the_nearest_divisors():
    with pytest.raises(ShapeError) as caught:
        check_groups((KroneckerShape(8, 100, 96, 30),), 768, 3072, "'layer.3.output'")
    assert str(caught.value) == (
        "'layer.3.output': a_in=100 does not divide in_features=3072. The nearest divisors are 96 "
        "and 128: use one of them, or leave the layer dense (keep=[its name])."
    )
    assert isinstance(caught.value, KronbertError)


def test_a_size_beyond_the_layer_has_one_nearest_divisor():
    with pytest.raises(
        ShapeError, match=r"b_out=1000 does not .*768\. The nearest divisor is 768:"
    ):
        check_groups((KroneckerShape(1, 1, 1000, 768),), 768, 768, "x")


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ((), "x: expected at least one Kronecker shape, got none"),
        ((KroneckerShape(384, 384, 2, 4),), "makes a 768x1536 weight, expected 768x768"),
        (("384x384*2x2",), "is a str, expected a KroneckerShape"),
        (
            (KroneckerShape(384, 384, 2, 2), KroneckerShape(2, 2, 96, 384)),
            r"2x2⊗96x384 makes a 192x768",
        ),
    ],
)
def test_groups_that_do_not_make_the_weight(groups, text):
    with pytest.raises(ShapeError, match=text):
        check_groups(groups, 768, 768, "x")


def test_divisors():
    assert list(divisors(1)) == [1]
    assert list(divisors(36)) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert near_divisors(5, 36) == (4, 6)
    assert near_divisors(6, 36) == (6, 6)
