"""Compiles every kernel launch of `aot_cases_*.py` for GPUs that are not here, and reads what the
machine code needs: registers, spills, shared memory. Run as a script, without Triton's interpreter.

A case is ``(name, call)`` or ``(name, call, Allowance)``: ``call()`` calls launchers on `meta`
tensors. `JITFunction.run` is replaced by a recorder, so nothing is launched and no driver is
needed; each recorded launch is compiled with the specialisation the real one would get.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aot_launches import Allowance, Launch, record  # type: ignore[import-not-found]

HERE = Path(__file__).resolve().parent
ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory one block may take (CUDA C++ Programming Guide, compute capabilities).
Code for sm_80 is as for sm_86 and sm_89, whose 99 KiB count; sm_80 itself has 163."""

SMALL_SHARED = 99 * 1024
"""The same for sm_120: beyond it a launch is marked in the table, not failed."""

PATIENCE_S = 180
"""A compilation that takes longer ends the run; the usual one takes 0.3 to 3 s."""


@dataclass
class Result:
    """What one launch needs on one architecture. spills: bytes per thread that ptxas stores."""

    case: str
    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    seconds: float
    problem: str = ""


def case_files() -> list[str]:
    """The names x of the files aot_cases_x.py, but for the one that must fail."""
    found = {path.stem.removeprefix("aot_cases_") for path in HERE.glob("aot_cases_*.py")}
    return sorted(found - {"selftest"})


def launches(module: str) -> tuple[list[Launch], list[str]]:
    """The different launches of ``aot_cases_<module>``, and what is wrong with its cases."""
    found: dict[str, Launch] = {}
    problems = []
    try:
        cases = list(importlib.import_module(f"aot_cases_{module}").cases())
    except Exception:
        return [], [f"aot_cases_{module}.py: cases() failed:\n{traceback.format_exc()}"]
    for name, call, *rest in cases:
        try:
            recorded = record(call)
        except Exception:
            problems.append(f"{name}: the launcher failed:\n{traceback.format_exc()}")
            continue
        if not recorded:
            problems.append(f"{name}: no kernel was launched")
        allowance = Allowance(*rest[0]) if rest else None
        for launch in recorded:
            launch = found.setdefault(launch.key, launch)
            if name not in launch.cases:
                launch.cases.append(name)
            launch.allowance = allowance or launch.allowance
    return list(found.values()), problems


def tool(name: str) -> str | None:
    """The path of ptxas or cuobjdump: Triton's own, or the one in PATH."""
    import triton

    ours = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(ours) if ours.exists() else shutil.which(name)


def unsupported(arch: int) -> str | None:
    """Why no assembler here makes code for ``arch``, or None."""
    # Triton's wheel brings a second, newer assembler for the newest architectures.
    for path in filter(None, (tool("ptxas"), tool("ptxas-blackwell"))):
        known = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
        if re.search(rf"\bsm_{arch}a?\b", known):
            return None
    return f"sm_{arch}: Triton's wheel has no ptxas that knows it"


def spilled(ptx: str, arch: int) -> int:
    """Bytes per thread that the assembler says it spills."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    name = "ptxas-blackwell" if arch >= 100 and tool("ptxas-blackwell") else "ptxas"
    path = tool(name)
    if target is None or path is None:
        raise FileNotFoundError(f"no target in the PTX, or no {name}")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        print(ptx, file=file, flush=True)
        command = [path, "-v", f"--gpu-name={target[1]}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores", said)
    if found is None:
        raise ValueError(f"ptxas said nothing of spills:\n{said}")
    return int(found[1])


def compile_launch(launch: Launch, arch: int) -> Result:
    """Compile for sm_<arch> and read the machine code's needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    began = time.monotonic()
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs={
            (launch.kernel.arg_names.index(name),): value
            for name, value in launch.constants.items()
        },
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    dump = tool("cuobjdump")
    if dump is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's wheel nor in PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    needs = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if needs is None:
        raise ValueError(f"cuobjdump said nothing of registers:\n{usage}")
    return Result(
        case=launch.case,
        kernel=launch.kernel.__name__,
        arch=arch,
        registers=int(needs[1]),
        spills=spilled(compiled.asm["ptx"], arch) if int(needs[2]) else 0,  # needs a stack
        shared=int(compiled.metadata.shared),
        seconds=round(time.monotonic() - began, 2),
    )


# Bytes that Triton 3.7's ptxas spills where 3.9's spills none, at 48 to 168 registers.
KNOWN = {
    ("_norm_kernel", "add_norm 768 p=0.0 fp32"): 4,
    ("_norm_backward_kernel", "residual_norm 768 p=0.1 bf16"): 4,
    ("norm_backward_kernel", "embedding svd 64 float32"): 20,
    ("small_big_kernel", "16x2*192x384 fp32"): 4,
}


def judge(launch: Launch, result: Result) -> str:
    """What is wrong with ``result``, or nothing."""
    found = (n for (k, c), n in KNOWN.items() if k == result.kernel and result.case.startswith(c))
    allowed = next(found, 0)
    if launch.allowance is not None:
        if launch.dtypes != {"fp32"}:
            return "only a float32 launch may be allowed spills: remove its Allowance"
        if not launch.allowance.reason.strip():
            return "its Allowance has no reason"
        allowed = launch.allowance.spill_bytes
    limit = SHARED_LIMIT[result.arch]
    if result.spills > allowed:
        return f"spills {result.spills} bytes per thread, {allowed} allowed"
    if result.shared > limit:
        return f"takes {result.shared} bytes of shared memory, {limit} exist"
    return ""


def needs_of(launch: Launch, arch: int, cache: Path | None) -> Result:
    """`compile_launch`, or what an earlier run found for the same source, and the verdict."""
    kept = cache and cache / f"{launch.key[:32]}-{arch}.json"
    if kept and kept.exists():
        result = Result(**json.loads(kept.read_text()))
        result.case, result.seconds = launch.case, 0.0
    else:
        print(f"compiling {launch.case} [{launch.kernel.__name__}] sm_{arch}", file=sys.stderr)
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)  # LLVM hears no other signal
        try:
            result = compile_launch(launch, arch)
        except Exception:
            result = Result(launch.case, launch.kernel.__name__, arch, 0, 0, 0, 0.0)
            result.problem = f"does not compile:\n{traceback.format_exc(limit=-1, chain=False)}"
            return result
        finally:
            faulthandler.cancel_dump_traceback_later()
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(asdict(result)))
            partial.replace(kept)
    result.problem = judge(launch, result)
    return result


def run(
    modules: list[str], archs: dict[int, bool], cache: Path | None
) -> Iterator[tuple[str, Result | str]]:
    """(module, result or what is wrong with a case); archs: architecture -> bfloat16 only."""
    for module in modules:
        found, problems = launches(module)
        for problem in problems:
            yield module, problem
        for launch in found:
            for arch, half_only in archs.items():
                if not half_only or "bf16" in launch.dtypes:
                    yield module, needs_of(launch, arch, cache)


def line(result: Result) -> str:
    mark = " (over 99 KiB)" if result.shared > SMALL_SHARED else ""
    return (
        f"{result.case} [{result.kernel}] sm_{result.arch}: {result.registers} registers, "
        f"{result.spills} bytes spilled, {result.shared} bytes shared{mark}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile, print a line per launch and architecture; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="x of aot_cases_x.py; default: all")
    parser.add_argument("--archs", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--half-only", type=int, nargs="*", default=[], help="bfloat16 only there")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path, help="write {module: {results, problems}} and skipped")
    given = parser.parse_args(arguments)
    skipped = {arch: reason for arch in given.archs if (reason := unsupported(arch))}
    archs = {arch: arch in given.half_only for arch in given.archs if arch not in skipped}
    modules = given.modules or case_files()
    report: dict[str, Any] = {m: {"results": [], "problems": []} for m in modules}
    failed = False
    began = time.monotonic()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of 3.5 to 3.9, unwarned
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch
        for module, found in run(modules, archs, given.cache):
            text = found if isinstance(found, str) else line(found)
            problem = found if isinstance(found, str) else found.problem
            failed |= bool(problem)
            if isinstance(found, str):
                report[module]["problems"].append(found)
            else:
                report[module]["results"].append(asdict(found))
                if problem:
                    text += f"  <- {problem}"
                    report[module]["problems"].append(f"{line(found)}: {problem}")
            print(text, flush=True)
    report["skipped"] = skipped
    report["seconds"] = round(time.monotonic() - began, 1)
    for reason in skipped.values():
        print(f"skipped: {reason}")
    print(f"{report['seconds']} s")
    if given.json:
        given.json.write_text(json.dumps(report))
    return int(failed)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is first imported
    raise SystemExit(main())
