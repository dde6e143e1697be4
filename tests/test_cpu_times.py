"""The CPU's measured times: interpolation between them, and their files."""

import itertools
import json
import math

import pytest
import torch

from kronbert import cpu_cost
from kronbert.cpu_cost import CostTable, Primitive, shipped_tables
from kronbert.errors import ReportError


def random_primitive(*axes):
    times = [3 + 100 * t for t in torch.rand(math.prod(map(len, axes))).tolist()]
    return Primitive(tuple(axes), tuple(times))


def test_grid_points_are_exact():
    axes = ((1, 4, 16), (2, 6, 96), (3, 5))
    primitive = random_primitive(*axes)
    for sizes, us in zip(itertools.product(*axes), primitive.times_us, strict=True):
        assert primitive.us(*sizes) == pytest.approx(us, rel=1e-12)


def test_powers_of_the_sizes_are_exact_between():
    axes = ((1, 10, 300), (2, 50), (4, 7, 2000))

    def law(m, n, k):
        return 0.3 * m**1.1 * n**0.5 * k

    primitive = Primitive(axes, tuple(law(*sizes) for sizes in itertools.product(*axes)))
    for sizes in [(3, 7, 5), (10, 3, 900), (299, 49, 1999), (2, 2, 2000)]:
        assert primitive.us(*sizes) == pytest.approx(law(*sizes), rel=1e-9)


def test_between_neighbours_time_lies_between_theirs():
    primitive = Primitive(((2, 8, 64),), (5.0, 40.0, 11.0))
    rising = [primitive.us(m) for m in range(2, 9)]
    falling = [primitive.us(m) for m in range(8, 65)]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert len(set(rising)) == len(rising)
    assert primitive.us(4) == pytest.approx(200**0.5)  # halfway in both logarithms


def test_beyond_the_grid_time_grows_with_the_work():
    primitive = random_primitive((1, 8), (2, 16))
    corner = primitive.times_us[-1]
    assert primitive.us(24, 16) == pytest.approx(3 * corner)
    assert primitive.us(8, 40) == pytest.approx(2.5 * corner)
    assert primitive.us(24, 40) == pytest.approx(7.5 * corner)


def test_below_the_grid_time_stays():
    primitive = random_primitive((4, 8), (6, 16))
    assert primitive.us(1, 16) == primitive.us(4, 16)
    assert primitive.us(8, 1) == primitive.us(8, 6)
    assert primitive.us(0, 0) == primitive.us(4, 6)


@pytest.mark.parametrize(
    "times", [(1.0,), (1.0, 2.0, 3.0), (1.0, 0.0), (1.0, -2.0), (1.0, math.inf)]
)
def test_times_that_are_none_are_refused(times):
    with pytest.raises(ReportError, match=r"on a grid of 2 points: expected one for each"):
        Primitive(((1, 2),), times)


def test_json_round_trip(tmp_path):
    tables = {
        name: CostTable(
            itemsize,
            random_primitive((1, 4), (2, 6), (3, 5)),
            random_primitive((1, 4), (2, 6), (3, 5), (2, 9)),
            random_primitive((1, 4), (2, 6), (3, 5)),
            random_primitive((1, 4)),
        )
        for name, itemsize in (("float32", 4), ("bfloat16", 2))
    }
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"tables": {name: t.to_json() for name, t in tables.items()}}))
    read = cpu_cost.load_tables(file)
    assert read.keys() == tables.keys()
    for name, found in read.items():
        assert found.itemsize == tables[name].itemsize
        for part in cpu_cost.PRIMITIVES:
            one, other = getattr(found, part), getattr(tables[name], part)
            assert one.axes == other.axes
            assert one.times_us == pytest.approx(other.times_us, rel=1e-3)
        assert found == CostTable.from_json(json.loads(json.dumps(found.to_json())))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"tables": []}',
        '{"tables": {"float32": 3}}',
        '{"tables": {"float32": {"itemsize": 4}}}',
        b"\xff\xfe",
        None,
        "no bfloat16",
        "one time missing",
    ],
)
def test_damaged_files_are_refused(text, tmp_path):
    file = tmp_path / "times.json"
    whole = {name: shipped.to_json() for name, shipped in shipped_tables().items()}
    if text == "no bfloat16":
        text = json.dumps({"tables": {"float32": whole["float32"]}})
    elif text == "one time missing":
        whole["float32"]["mix"]["times_us"].pop()
        text = json.dumps({"tables": whole})
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ReportError, match=r"times.json: holds no measured times"):
        cpu_cost.load_tables(file)
