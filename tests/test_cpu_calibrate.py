"""Measured times: where they lie, that damage does no harm, and the command that makes them."""

import itertools
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kronbert import (
    CheckpointError,
    KroneckerLinear,
    KroneckerShape,
    PlanError,
    cli,
    cli_calibrate,
    cpu,
    native,
)
from kronbert import cpu_calibrate as calibration
from kronbert.cpu_cost import PRIMITIVES, CostTable, load_tables, shipped_tables
from kronbert.forms import DENSE

GRIDS = {
    "GEMM": ((1, 8), (4, 8), (4, 8)),
    "MIX": ((1, 8), (2, 4), (2, 4), (2, 4)),
    "TURN": ((1024, 2048), (2, 4), (2, 4)),
    "ADD": ((1024, 2048),),
}


def forget_tables():
    cpu.tables.cache_clear()
    cpu._choose.cache_clear()
    cpu.forget()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder of this test's own, and few points to measure."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KRONBERT_CACHE", str(folder))
    for name, grid in GRIDS.items():
        monkeypatch.setattr(calibration, name, grid)
    monkeypatch.setattr(calibration, "SAMPLES", 1)
    monkeypatch.setattr(calibration, "SAMPLE_S", 1e-6)
    monkeypatch.setattr(cli_calibrate.out, "_width", 200)
    forget_tables()
    yield folder
    forget_tables()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_a_file_is_written_and_read(cache):
    path = calibration.calibrate()
    assert path == calibration.cache_file()
    assert list(cache.iterdir()) == [path]  # no part of it is left
    written = json.loads(path.read_text())
    assert written["machine"] == calibration.machine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cpu.tables()
    assert found == load_tables(path)
    assert found != shipped_tables()
    for name, costs in found.items():
        assert costs.itemsize == calibration.DTYPES[name].itemsize
        for part in PRIMITIVES:
            assert getattr(costs, part).axes == GRIDS[part.upper()]
            assert len(set(getattr(costs, part).times_us)) > 1


def test_the_choice_follows_the_file(cache):
    """The file's times, not the shipped ones, decide what a layer runs."""
    path = calibration.calibrate()
    content = json.loads(path.read_text())
    for table in content["tables"].values():
        table["gemm"] = {"axes": [[10**9]] * 3, "times_us": [1e6]}  # any product: 1 s
    path.write_text(json.dumps(content))
    shape = KroneckerShape(384, 48, 2, 16)
    assert cpu.choose((shape,), torch.float32, 128) == (DENSE,)
    forget_tables()
    path.unlink()
    assert cpu.choose((shape,), torch.float32, 128) != (DENSE,)


def test_a_file_is_replaced_whole_or_not_at_all(cache, monkeypatch):
    path = calibration.calibrate()
    before = path.read_bytes()
    write = Path.write_text

    def full(self, text, *args, **more):
        write(self, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        calibration.calibrate()
    assert path.read_bytes() == before
    assert list(cache.iterdir()) == [path]
    assert calibration.tables()[1] is None


def test_two_that_measure_at_once_both_write(cache, monkeypatch):
    write, inner = Path.write_text, []

    def and_another(self, text):
        write(self, text)
        if not inner:
            inner.append("begun")
            inner.append(calibration.calibrate())

    monkeypatch.setattr(Path, "write_text", and_another)
    path = calibration.calibrate()
    assert inner == ["begun", path]
    assert list(cache.iterdir()) == [path]
    assert calibration.tables() == (load_tables(path), None)


@pytest.mark.parametrize(
    ("key", "value"),
    [("itemsize", "4"), ("itemsize", 0), ("axes", [[0, 2], [1], [1]]), ("axes", [[2, 1], [1], [1]]),
     ("axes", [[1.5, 2], [1], [1]]), ("axes", [[1, 2]])],
)  # fmt: skip
def test_times_on_impossible_sizes_give_way_too(key, value, cache):
    path = calibration.calibrate()
    content = json.loads(path.read_text())
    table = content["tables"]["float32"]
    (table if key == "itemsize" else table["gemm"])[key] = value
    table["gemm"]["times_us"] = [1.0] * math.prod(len(axis) for axis in table["gemm"]["axes"])
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="this machine's calibration cannot be read"):
        assert cpu.tables() == expected_shipped()


@pytest.mark.parametrize("content", ["", "{}", '{"tables": {"float32": {}}}', "half", "a folder"])
def test_a_damaged_file_gives_way_to_the_shipped_one(content, cache):
    path = calibration.calibrate()
    whole = path.read_text()
    path.unlink()
    if content == "a folder":
        path.mkdir()
        assert calibration.tables() == (expected_shipped(), None)  # no file, no warning
        return
    path.write_text(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.warns(
        UserWarning, match=rf"{path.name}: this machine's calibration cannot be read"
    ):
        assert cpu.tables() == expected_shipped()
    with warnings.catch_warnings():  # once a process
        warnings.simplefilter("error")
        cpu.tables()
        layer = KroneckerLinear(28, 30, KroneckerShape(6, 4, 5, 7))
        with torch.no_grad():
            layer(torch.randn(3, 28))
    calibration.calibrate()  # as the warning says
    forget_tables()
    assert cpu.tables() == load_tables(path)


def expected_shipped():
    shipped = shipped_tables()
    if torch.cpu._is_amx_tile_supported():
        return shipped
    return {name: shipped["float32"] for name in shipped}


def test_without_a_file_the_shipped_one_holds(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.tables() == expected_shipped()
    assert not cache.exists()


@pytest.mark.parametrize("amx", [True, False])
def test_the_shipped_bfloat16_times_need_amx(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    found, damaged = calibration.tables()
    assert damaged is None
    assert found["float32"] == shipped_tables()["float32"]
    assert found["bfloat16"] == shipped_tables()["bfloat16" if amx else "float32"]
    assert shipped_tables()["bfloat16"] != shipped_tables()["float32"]


def test_another_number_of_threads_has_another_file(cache, threads):
    path = calibration.calibrate()
    torch.set_num_threads(threads + 1)
    assert calibration.cache_file() != path
    assert calibration.machine()["threads"] == threads + 1
    assert cpu.tables() == expected_shipped()
    torch.set_num_threads(threads)
    assert calibration.cache_file() == path


@pytest.mark.parametrize("part", ["cpu", "instructions", "amx", "torch"])
def test_another_machine_has_another_file(part, monkeypatch):
    path, machine = calibration.cache_file(), calibration.machine()
    monkeypatch.setattr(calibration, "machine", lambda: machine | {part: "another"})
    assert calibration.cache_file() != path
    assert calibration.cache_file().parent == path.parent


def test_other_row_kernels_have_another_file(monkeypatch):
    """Else the costs of slower ones would go on choosing forms without them."""
    path = calibration.cache_file()
    monkeypatch.setattr(native, "source", lambda: "another")
    assert calibration.cache_file() != path


def test_where_files_lie(monkeypatch, tmp_path):
    name = calibration.cache_file().name
    assert calibration.cache_file() == tmp_path / "cache" / name
    monkeypatch.delenv("KRONBERT_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert calibration.cache_file() == tmp_path / "xdg" / "kronbert" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert calibration.cache_file() == tmp_path / "home" / ".cache" / "kronbert" / name
    monkeypatch.setattr(sys, "platform", "darwin")
    mac = tmp_path / "home" / "Library" / "Caches" / "kronbert" / name
    assert calibration.cache_file() == mac


# Measuring.


def test_without_a_home_the_shipped_one_holds(monkeypatch):
    """As in a container whose user has no entry of its own."""

    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KRONBERT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert calibration.tables() == (expected_shipped(), None)
    with pytest.raises(CheckpointError, match=r"no home\. Name a folder by KRONBERT_CACHE"):
        calibration.calibrate()


def test_times_stand_in_the_order_of_the_grid(monkeypatch):
    monkeypatch.setattr(calibration, "_time_us", lambda sizes: 100 * sizes[0] + sizes[1])
    found = calibration._times(lambda *sizes: sizes, ((1, 2), (3, 4, 5)))
    assert found.times_us == (103, 104, 105, 203, 204, 205)


def test_work_beyond_the_limits_is_scaled_not_run(monkeypatch):
    ran = []

    def make(*sizes):
        ran.append(sizes)
        return sizes

    monkeypatch.setattr(calibration, "_time_us", lambda sizes: 7.0)
    monkeypatch.setattr(calibration, "MOST_WORK", 100)
    monkeypatch.setattr(calibration, "MOST_NUMBERS", 40)
    axes = ((1, 10, 60), (2, 4), (3,))
    found = calibration._times(make, axes)
    assert ran == [(1, 2, 3), (1, 4, 3), (10, 2, 3)]  # (10, 4, 3) is 120 products
    times = dict(zip(itertools.product(*axes), found.times_us, strict=True))
    assert times[10, 4, 3] == pytest.approx(70)
    assert times[60, 2, 3] == pytest.approx(42)
    assert times[60, 4, 3] == pytest.approx(420)


def test_the_fastest_sample_counts(monkeypatch):
    clock, now = iter([5e-6, 4e-6, 9e-6, 2e-6, 8e-6]), [0.0]
    monkeypatch.setattr(calibration, "SAMPLES", 3)
    monkeypatch.setattr(calibration, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(clock)

    assert calibration._time_us(call) == pytest.approx(2.0)  # the first call warms up
    assert list(clock) == []


def test_a_slow_call_is_timed_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(calibration, "SAMPLES", 3)
    monkeypatch.setattr(calibration, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.5

    assert calibration._time_us(call) == pytest.approx(5e5)
    assert now == [1.0]


def test_what_is_measured_is_what_runs(monkeypatch):
    """Each primitive is called once with tensors of its sizes and dtype."""
    monkeypatch.setattr(calibration, "_time_us", lambda call: 1.0 + call().numel())
    found = calibration.measure(torch.bfloat16)
    assert isinstance(found, CostTable)
    assert found.itemsize == 2
    assert found.gemm.us(8, 4, 8) == pytest.approx(1 + 8 * 4)
    assert found.mix.us(8, 2, 4, 4) == pytest.approx(1 + 8 * 2 * 4)
    assert found.turn.us(2048, 2, 4) == pytest.approx(1 + 2048)
    assert found.add.us(2048) == pytest.approx(1 + 2048)


# The command.


def run(*words):
    result = CliRunner().invoke(cli.app, ["calibrate", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_command(cache):
    text = run()
    path = calibration.cache_file()
    assert f"wrote {path} in " in text
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in text
    assert cpu.tables() == load_tables(path)
    for words in ("k19, k21", "attention", "expand", "contract", "16x2⊗192x384", "bfloat16"):
        assert words in text
    chosen = load_tables(path)["float32"].choose((KroneckerShape(16, 2, 192, 384),), 128)[0]
    (line,) = [line for line in text.splitlines() if "16x2⊗192x384" in line]
    assert str(chosen) in line


def test_command_with_a_file_and_threads(cache, tmp_path, threads):
    file = tmp_path / "new" / "times.json"
    text = run("--output", file, "--threads", threads + 1)
    assert f"wrote {file} in " in text
    assert f"{threads + 1} threads" in text
    assert torch.get_num_threads() == threads
    assert json.loads(file.read_text())["machine"]["threads"] == threads + 1
    assert set(file.parent.iterdir()) == {file}
    assert not cache.exists()
    run("--threads", threads + 1)
    assert len(list(cache.iterdir())) == 1
    assert not calibration.cache_file().exists()  # that of this process's threads


def test_command_refuses_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "measure", lambda dtype: pytest.fail("measured"))
    with pytest.raises(PlanError, match=r"is a folder\. Name a file in it"):
        run("--output", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run("--output", tmp_path / "file" / "times.json")
    with pytest.raises(AssertionError, match="threads"):
        run("--threads", 0)


def test_command_has_help():
    assert "fastest form" in run("--help")
