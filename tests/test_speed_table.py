"""The page of speeds: every case the benchmarks measure has its place, with made-up figures."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kronbert import bench_gpu
from kronbert.bench_gpu import Sizes
from kronbert.bench_results import Results

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "make_speed_table.py"
PAGE = ROOT / "docs" / "speed.md"
PEERS = ("nn.Linear", "two matmuls", "torch.kron", "einsum", "tensorly-torch BlockTT")
SMALL = Sizes(device="cpu", width=96, entries=50, tokens=(6,), check_rows=(5,))


@pytest.fixture(scope="module")
def bench_cpu():
    spec = importlib.util.spec_from_file_location("bench_cpu", ROOT / "examples" / "bench_cpu.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def timing(value):
    return {"median_ms": value, "p20_ms": value * 0.9, "p80_ms": value * 1.1}


def cpu_row(part, case):
    """A row as bench_cpu writes it: kronbert twice as fast as everything."""
    names = {
        "encoder": ("k8", "k19", "k21", "k21 compiled", "dense compiled"),
        "training": (case.split()[0],),
        "onnx": ("k21 fp32", "k21 bf16"),
        "never_slower": ("kronbert",),
        "kernels": ("one register", "16 numbers"),
    }
    if case.startswith("machine"):
        return {"flop_per_s": 2e11, "bytes_per_s": 1e10}
    if part == "micro":
        row = {"ms": {name: timing(2.0) for name in PEERS}, "ratio": dict.fromkeys(PEERS, 2.0)}
        row["ms"]["kronbert"] = timing(1.0)
        row["absent"] = {"pyfastkron": "not installed", "PEFT LoKr": "one Kronecker term only"}
        sizes = {"flops": 1e7, "dense_flops": 1e8, "bytes": 1e6, "dense_bytes": 2e6}
        return row | sizes | {"shape": "384x48*2x16"}
    ratio = dict.fromkeys(names[part], 2.0)
    row = {"ms": dict.fromkeys((*ratio, "dense"), timing(3.0)), "ratio": ratio}
    if part == "training":
        row["saved_for_backward_bytes"] = {"dense": 2**30, names[part][0]: 2**28}
    if part == "onnx":
        for kind in ("fp32", "int8"):
            row["ms"][f"onnxruntime {kind}"] = timing(4.0)
            row[f"ratio_to_onnxruntime_{kind}"] = {"k21 fp32": 2.0, "k21 bf16": 6.0}
        row["relative_error"] = {"onnxruntime fp32": 1e-6, "onnxruntime int8": 2e-2}
    return row


def gpu_row(part, case):
    if case == "machine":
        return {"flop_per_s": 1e15, "bytes_per_s": 4e12}
    if part == "correctness":
        return {"passed": True, "worst": 1.25, "where": "output"}
    names = ("dense", "kronbert", "fused")
    row = {"ms": {name: timing(1.0) for name in names}}
    row["ratio"] = {"kronbert": 3.0} if part == "micro" else {"fused": 3.0}
    if part == "micro" and case.endswith("forward"):
        row |= {"flops": 5e11, "bytes": 1e6}
    if part == "training":
        row["peak_above_model_bytes"] = {"dense": 2**34, "fused": 2**32}
    return row


def fill(results, parts, row):
    """The names of all cases, whose rows are filled in; written once, not after each row."""
    names, write = {}, results.write
    results.write = lambda: None
    for part, cases in parts.items():
        names[part] = [name for name, _ in cases]
        made = [(name, lambda p=part, n=name: row(p, n)) for name in names[part]]
        results.section(part, made, say=lambda line: None)
    write()
    return names


@pytest.fixture
def page(tmp_path):
    copy = tmp_path / "speed.md"
    copy.write_text(PAGE.read_text())
    return copy


def run(page, *words):
    return subprocess.run(
        [sys.executable, SCRIPT, "--page", page, "--results", page.parent, *words],
        capture_output=True, text=True, cwd=page.parent,
    )  # fmt: skip


def tables(page):
    found = re.findall(r"<!-- table: (\w+) -->\n(.*?)\n<!-- end -->", page.read_text(), re.DOTALL)
    return dict(found)


def test_without_results_nothing_is_measured(page):
    assert run(page).returncode == 0
    assert set(tables(page).values()) == {"not measured"}
    assert not page.with_name("speed_roofline.png").exists()


def test_every_case_has_its_row(page, bench_cpu):
    cpu = Results(page.with_name("speed_cpu.json"), command="python bench", commit="c0ffee")
    parts = {name: list(part(False)) for name, part in bench_cpu.PARTS.items()}
    names = fill(cpu, {k: v for k, v in parts.items() if k != "never_slower"}, cpu_row)
    plans = Results(page.with_name("speed_cpu_plans.json"), command="python bench", commit="c0ffee")
    names |= fill(plans, {"never_slower": parts["never_slower"]}, cpu_row)
    avx2 = Results(page.with_name("speed_cpu_avx2.json"), command="python bench", commit="c0ffee")
    fill(avx2, {name: bench_cpu.PARTS[name](False) for name in ("encoder", "kernels")}, cpu_row)
    gpu = Results(page.with_name("speed_gpu.json"), command="python gpu", commit="c0ffee")
    on_gpu = {name: part(SMALL) for name, part in bench_gpu.SECTIONS.items()}
    gpu_names = fill(gpu, on_gpu, gpu_row)
    done = run(page)
    assert done.returncode == 0, done.stderr
    found = tables(page)
    assert "not measured" not in found.values()
    lines = {
        name: len(re.findall(r"^\| (?!.*---)", body, re.M)) - 1 for name, body in found.items()
    }
    assert lines["cpu_encoder"] + lines["cpu_compile"] == len(names["encoder"])
    assert lines["cpu_encoder_avx2"] == lines["cpu_encoder"]
    assert lines["cpu_kernels"] == len(names["kernels"]) == 8
    assert lines["cpu_micro"] + lines["cpu_micro_backward"] == len(names["micro"]) - 2
    assert lines["cpu_training"] == len(names["training"])
    assert lines["cpu_onnx"] == 2 * len(names["onnx"])
    assert lines["cpu_never_slower"] == 4  # two models, two dtypes
    assert lines["gpu_correctness"] == 3
    assert lines["gpu_micro"] == len(gpu_names["micro"]) - 1
    assert lines["gpu_encoder"] == len(gpu_names["encoder"]) + len(gpu_names["graphs"])
    assert lines["gpu_training"] == len(gpu_names["training"])
    assert "| **2.00x** (bar 5, missed) |" in found["cpu_encoder"]
    assert "| 2.00x (bar 1.4) |" in found["cpu_encoder"]
    assert "| **2.00x** (bar 5, missed) | 6.00x |" in found["cpu_onnx"]
    assert "| 50% |" in found["gpu_micro"]  # 5e11 FLOP at 1e15 a second are 0.5 ms of 1
    assert "at c0ffee." in found["cpu_micro"]
    assert page.with_name("speed_roofline.png").stat().st_size > 10_000
    assert run(page, "--check").returncode == 0
    page.write_text(page.read_text().replace("2.00x", "9.00x"))
    assert "run me" in run(page, "--check").stderr


def test_losing_and_missing_rows_stay(page):
    results = Results(page.with_name("speed_cpu.json"), command="python bench", commit="c0ffee")

    def slow(ratio):
        return lambda: {"ms": {"nn.Linear": timing(1.0)}, "ratio": {"kronbert": ratio}}

    def fails():
        raise MemoryError("too large")

    cases = [(f"MiniLM-L6 384x384 2x2*192x192 {n} rows fp32", slow(n / 10)) for n in (4, 16)]
    plans = Results(page.with_name("speed_cpu_plans.json"), command="python bench", commit="c0ffee")
    plans.section("never_slower", cases, say=lambda line: None)
    encoder = [("batch 1 sequence 128 fp32", fails)]
    results.section("encoder", encoder, say=lambda line: None)
    assert run(page).returncode == 0
    found = tables(page)
    assert "| 1 | **0.40x** (bar 1, missed) |" in found["cpu_never_slower"]
    assert "- MiniLM-L6 384x384 2x2*192x192 4 rows fp32: 0.40x" in found["cpu_never_slower"]
    assert "not measured: MemoryError: too large" in found["cpu_encoder"]


def test_a_quick_run_is_no_result(page):
    Results(page.with_name("speed_cpu.json"), command="python bench", quick=True).write()
    done = run(page)
    assert done.returncode == 1
    assert "--quick" in done.stderr


def test_the_page_says_what_its_results_say():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_quick_cases_are_few(bench_cpu):
    quick = json.dumps({name: [case for case, _ in bench_cpu.PARTS[name](True)]
                        for name in ("micro", "training")})  # fmt: skip
    assert quick.count("rows") <= 6
