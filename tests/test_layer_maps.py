"""Layer maps: integers in, integers out, and the sentences for maps that do not fit."""

import pytest

from kronbert.distill import layer_maps
from kronbert.errors import DistillError


def test_identity_pairs_equal_depths():
    assert layer_maps.identity(3, 3) == (1, 2, 3)


def test_uniform_is_tinyberts():
    assert layer_maps.uniform(4, 12) == (3, 6, 9, 12)
    assert layer_maps.uniform(6, 12) == (2, 4, 6, 8, 10, 12)
    assert layer_maps.uniform(4, 6) == (1, 3, 4, 6)
    assert layer_maps.uniform(5, 5) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("layer_map", "expected"),
    [((0, 2, None, 7), (0, 2, 0, 7)), ("uniform", (2, 4, 6, 8)), ((8, 1, 1, 8), (8, 1, 1, 8))],
)
def test_resolve(layer_map, expected):
    assert layer_maps.resolve(layer_map, 4, 8) == expected


@pytest.mark.parametrize(
    ("layer_map", "student", "teacher", "text"),
    [
        ("identity", 4, 6, "the student has 4 layers, the teacher 6. Use 'uniform'"),
        ("uniform", 6, 4, "6 student layers, but 4 teacher layers"),
        ("unifrom", 2, 2, "'unifrom' is not known. Nearest: 'uniform'"),
        ((1, 2), 3, 6, "2 entries for 3 student layers"),
        ((1, 2, 7), 3, 6, "student layer 3 points at teacher layer 7; the teacher has layers 1 to"),
        ((0, None), 2, 2, "supervises no layer: drop the layer terms"),
        ((-1, 1), 2, 2, "expected teacher layers from 1, 0 or None for none"),
        ((1.0, 2), 2, 2, "expected teacher layers from 1, 0 or None for none"),
    ],
)
def test_maps_that_do_not_fit(layer_map, student, teacher, text):
    with pytest.raises(DistillError, match=text):
        layer_maps.resolve(layer_map, student, teacher)
