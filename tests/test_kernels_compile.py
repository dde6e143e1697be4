"""Every kernel, compiled for GPUs that are not here: no spills to speak of, and shared memory that
exists.

For sm_90; with KRONBERT_AOT_ALL=1 for sm_80 and sm_100 too. ``python tests/test_kernels_compile.py
linear`` prints the table of one file of cases.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
EVERYTHING = "KRONBERT_AOT_ALL"
FILES = sorted(path.stem.removeprefix("aot_cases_") for path in HERE.glob("aot_cases_*.py"))
pytest.importorskip("triton", reason="Triton is published for Linux only")


def run_aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`aot.py` in a process of its own: this one may have Triton's interpreter on."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "aot.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)


def report_of(request, folder, modules: list[str], *options: str) -> dict[str, Any]:
    """{file of cases: {results, problems}, skipped, seconds} of one process."""
    path = folder.mktemp("aot") / "report.json"
    arguments = [*modules, "--json", str(path), *options]
    cache = getattr(request.config, "cache", None)
    if cache is not None:
        arguments += ["--cache", str(cache.mkdir("kronbert-aot"))]
    done = run_aot(*arguments)
    assert path.exists(), f"aot.py failed:\n{done.stdout}\n{done.stderr}"
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def selftest(request, tmp_path_factory):
    """Cases with known verdicts, for every architecture."""
    return report_of(request, tmp_path_factory, ["selftest"])


@pytest.fixture(scope="session")
def report(request, tmp_path_factory):
    """The files of cases that were asked for, in one process."""
    named = {item.name for item in request.session.items if item.path == Path(__file__)}
    asked = [name for name in FILES if f"test_kernels_fit[{name}]" in named]
    # All three take 350 s on one core beside another job (sm_90 all dtypes 145 s, sm_80 and sm_100
    # bfloat16 alone 94 and 109 s; Triton 3.9): too long for every push.
    archs = ["80", "90", "100"] if os.environ.get(EVERYTHING) else ["90"]
    return report_of(request, tmp_path_factory, asked, "--archs", *archs)


@pytest.mark.parametrize("module", [name for name in FILES if name != "selftest"])
def test_kernels_fit(report, module):
    found = report[module]
    assert not found["problems"], "\n".join(found["problems"])
    assert found["results"], f"aot_cases_{module}.py: no case"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_architecture_is_compiled_for(selftest, arch):
    if str(arch) in selftest["skipped"]:
        pytest.skip(selftest["skipped"][str(arch)])
    assert arch in {result["arch"] for result in selftest["selftest"]["results"]}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("spills", r"\[_normalise\] sm_90: 32 registers, .*: spills \d+ bytes per thread, 0 allo"),
        ("allowed in half", "only a float32 launch may be allowed spills"),
        ("no reason", "its Allowance has no reason"),
        ("shared", r"over 99 KiB.*takes 2\d{5} bytes of shared memory, 232448 exist"),
        ("broken", "does not compile:"),
        ("raises", "ValueError: the launcher's own words"),
        ("idle", "no kernel was launched"),
    ],
)
def test_what_does_not_fit_is_named(selftest, case, said):
    problems = [
        text for text in selftest["selftest"]["problems"] if re.match(rf"{case}( \[|:)", text)
    ]
    assert problems, f"{case}: passed"
    assert any(re.search(said, text, re.DOTALL) for text in problems), problems


def test_what_fits_passes(selftest):
    """Equal launches are one, and each result holds what was read from the machine code."""
    found = [r for r in selftest["selftest"]["results"] if r["arch"] == 90 and not r["problem"]]
    assert [r["case"] for r in found] == ["fits and 1 more", "allowed", "shared fits"]
    assert all(16 <= r["registers"] <= 255 for r in found)
    assert [bool(r["spills"]) for r in found] == [False, True, False]
    assert [r["shared"] // 1024 for r in found] == [0, 0, 96]


def test_a_second_run_compiles_nothing(tmp_path):
    arguments = ["selftest", "--archs", "90", "--cache", str(tmp_path / "cache")]
    first, second = run_aot(*arguments), run_aot(*arguments)
    assert first.returncode == second.returncode == 1
    assert "compiling spills [_normalise] sm_90" in first.stderr
    # What did not compile is tried again.
    assert re.findall("compiling (.*)", second.stderr) == ["broken [_broken] sm_90"]
    assert first.stdout.splitlines()[:-1] == second.stdout.splitlines()[:-1]


def test_arguments_are_specialised_as_triton_does(monkeypatch):
    """A launch that is compiled with other types or alignments is not the one that runs."""
    native = pytest.importorskip("triton._C.libtriton").__dict__.get("native_specialize_impl")
    if native is None:
        pytest.skip("this Triton specialises arguments in Python")
    from triton.backends.compiler import BaseBackend

    spec = importlib.util.spec_from_file_location("aot_launches", HERE / "aot_launches.py")
    aot = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, aot)  # where its dataclasses look for their types
    spec.loader.exec_module(aot)
    tensors = [torch.zeros(64, dtype=getattr(torch, name)) for name in aot.POINTERS]
    numbers = [0, 1, 2, 16, 48, 100, -16, 2**31 - 16, 2**31, 2**40 + 1, 1.5, True, False]
    views = [tensors[2][4:], tensors[2][1:], tensors[0][8:], tensors[0][4:], tensors[5][16:]]
    for value in [*tensors, *views, *numbers, None]:
        for specialised, aligned in ((True, True), (True, False), (False, False)):
            param = SimpleNamespace(
                name="x",
                is_constexpr=False,
                annotation_type="",
                do_not_specialize=not specialised,
                do_not_specialize_on_alignment=not aligned,
            )
            kind, divisible = native(BaseBackend, value, False, specialised, aligned)
            said = (kind, divisible == "D")
            assert aot.specialise(param, value) == said, f"{value!r}: {specialised}, {aligned}"


if __name__ == "__main__":
    table = subprocess.run([sys.executable, str(HERE / "aot.py"), *sys.argv[1:]], check=False)
    raise SystemExit(table.returncode)
