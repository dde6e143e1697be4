"""Writes docs/speed.md's tables and roofline from the measurements in examples/results.

These are speed_cpu.json, speed_cpu_avx2.json, speed_cpu_plans.json and speed_gpu.json. A table
stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. What no file holds reads "not
measured"; rows that lose stay. --check only compares.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import roofline  # type: ignore[import-not-found]

from kronbert.bench_results import read

ROOT = Path(__file__).resolve().parent.parent

Sections = Mapping[str, Any]

NOT_MEASURED = "not measured"

ENCODER_BARS = {
    ("k21", "fp32"): 5.0,
    ("k8", "fp32"): 2.5,
    ("k21", "bf16"): 2.2,
    ("k8", "bf16"): 1.4,
}
"""Times as fast as the dense model, at sequence 128 and batch 1, 8 and 32."""

ONNX_STUDENTS = ("k21 fp32", "k21 bf16")
ONNX_BARS = {"fp32": ("k21 fp32", 5.0), "int8": ("k21 bf16", 2.0)}
"""The dense model's dtype -> the student that is held against it, and the bar."""

MICRO_BAR = 1.5
TRAINING_BAR = 2.0
NEVER_SLOWER_BAR = 1.0

PEERS = {
    "nn.Linear": "nn.Linear",
    "two matmuls": "two matmuls",
    "torch.kron": "torch.kron + linear",
    "einsum": "einsum",
    "pyfastkron": "pyfastkron",
    "tensorly-torch BlockTT": "BlockTT",
    "PEFT LoKr": "LoKr",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def times(ratio: float | None, bar: float | None = None) -> str:
    """A ratio, and in brackets the bar it had to reach; bold where it did not."""
    if ratio is None:
        return NOT_MEASURED
    shown = f"{ratio:.2f}x"
    if bar is None:
        return shown
    return f"{shown} (bar {bar:g})" if ratio >= bar else f"**{shown}** (bar {bar:g}, missed)"


def ms(row: Mapping[str, Any], name: str) -> str:
    found = row["ms"][name]
    return f"{found['median_ms']:.3g} ({found['p20_ms']:.3g}-{found['p80_ms']:.3g})"


def rows_of(sections: Sections, name: str) -> dict[str, Any]:
    return dict(sections.get(name, {}).get("rows", {}))


def failed(row: Mapping[str, Any]) -> str | None:
    """Why a row has no figures."""
    why = row.get("error") or row.get("left_out")
    return None if why is None else f"{NOT_MEASURED}: {str(why).splitlines()[0][:120]}"


def cpu_encoder(sections: Sections) -> str:
    lines = []
    for case, row in rows_of(sections, "encoder").items():
        if "compile" in case:
            continue
        found = re.fullmatch(r"batch (\d+) sequence (\d+) (\w+)", case)
        assert found is not None, case
        batch, sequence, dtype = found.groups()
        if why := failed(row):
            lines.append([batch, sequence, dtype, why, "", "", ""])
            continue
        barred = sequence == "128" and int(batch) <= 32
        cells = [
            times(row["ratio"][name], ENCODER_BARS.get((name, dtype)) if barred else None)
            for name in ("k8", "k19", "k21")
        ]
        lines.append([batch, sequence, dtype, ms(row, "dense"), *cells])
    return table(["batch", "sequence", "dtype", "dense, ms", "k8", "k19", "k21"], lines)


def cpu_compile(sections: Sections) -> str:
    names = ("dense compiled", "k21", "k21 compiled")
    lines = []
    for case, row in rows_of(sections, "encoder").items():
        if "compile" in case:
            why = failed(row)
            cells = [times(row["ratio"][name]) for name in names] if why is None else [why, "", ""]
            lines.append([case, *cells])
    return table(["fp32, times as fast as dense eager", *names], lines)


def cpu_kernels(sections: Sections) -> str:
    names = ("one register", "16 numbers")
    lines = []
    for case, row in rows_of(sections, "kernels").items():
        why = failed(row)
        cells = [times(row["ratio"][name]) for name in names] if why is None else ["", ""]
        lines.append([case, why or ms(row, "dense"), *cells])
    return table(["student", "dense, ms", *(f"vectors of {name}" for name in names)], lines)


def cpu_micro(sections: Sections) -> str:
    return _micro(rows_of(sections, "micro"), "forward")


def cpu_micro_backward(sections: Sections) -> str:
    return _micro(rows_of(sections, "micro"), "forward+backward")


def _micro(rows: Mapping[str, Any], way: str) -> str:
    lines = []
    for case, row in rows.items():
        found = re.fullmatch(r"(\S+ \S+) (\d+) rows (\w+) (\S+)", case)
        if found is None or found[4] != way:
            continue
        first = [f"{found[1]}, {row.get('shape', '').replace('*', '⊗')}", found[2], found[3]]
        if why := failed(row):
            lines.append([*first, why, "", *("" for _ in PEERS)])
            continue
        cells = [
            times(row["ratio"][name]) if name in row["ratio"] else row["absent"][name]
            for name in PEERS
        ]
        best = min(row["ratio"].values())
        bar = MICRO_BAR if way == "forward" else None
        lines.append([*first, ms(row, "kronbert"), times(best, bar), *cells])
    return table(["map", "rows", "dtype", "kronbert, ms", "best peer", *PEERS.values()], lines)


def cpu_training(sections: Sections) -> str:
    lines = []
    for case, row in rows_of(sections, "training").items():
        name = case.split()[0]
        if why := failed(row):
            lines.append([case, why, "", ""])
            continue
        kept = row["saved_for_backward_bytes"]
        bar = TRAINING_BAR if name == "k21" and "batch 32" in case else None
        saved = f"{kept['dense'] / 2**20:.0f} / {kept[name] / 2**20:.0f} MiB"
        lines.append([case, ms(row, "dense"), times(row["ratio"][name], bar), saved])
    head = ["student", "dense step, ms", "student", "kept for backward, dense / student"]
    return table(head, lines)


def cpu_onnx(sections: Sections) -> str:
    lines = []
    for case, row in rows_of(sections, "onnx").items():
        if why := failed(row):
            lines.append([case, why, "", "", ""])
            continue
        for kind, (like, bar) in ONNX_BARS.items():
            ratios = row[f"ratio_to_onnxruntime_{kind}"]
            error = f"{row['relative_error'][f'onnxruntime {kind}']:.1e}"
            shown = ms(row, f"onnxruntime {kind}")
            each = [times(ratios[own], bar if own == like else None) for own in ONNX_STUDENTS]
            lines.append([case, f"{kind} (off by {error})", shown, *each])
    head = [
        "",
        "ONNX Runtime, dense",
        "its ms",
        *(f"{own}, times as fast" for own in ONNX_STUDENTS),
    ]
    return table(head, lines)


def cpu_never_slower(sections: Sections) -> str:
    rows = rows_of(sections, "never_slower")
    lines, losing = [], []
    for group in dict.fromkeys((case.split()[0], case.split()[-1]) for case in rows):
        mine = {c: row for c, row in rows.items() if (c.split()[0], c.split()[-1]) == group}
        measured = {c: row["ratio"]["kronbert"] for c, row in mine.items() if "ratio" in row}
        worst = min(measured, key=measured.__getitem__, default=None)
        below = {c: ratio for c, ratio in measured.items() if ratio < NEVER_SLOWER_BAR}
        losing += [f"- {c}: {ratio:.2f}x" for c, ratio in sorted(below.items(), key=lambda i: i[1])]
        least = None if worst is None else measured[worst]
        missing = len(mine) - len(measured)
        lines.append([*group, f"{len(measured)}", f"{missing}", f"{len(below)}",
                      times(least, NEVER_SLOWER_BAR)])  # fmt: skip
    head = ["model", "dtype", "maps x rows", NOT_MEASURED, "slower than nn.Linear", "worst"]
    return "\n".join([table(head, lines), *(["", "Slower:", "", *losing] if losing else [])])


def gpu_correctness(sections: Sections) -> str:
    rows = rows_of(sections, "correctness")
    lines = []
    for dtype in ("fp32", "fp16", "bf16"):
        mine = {case: row for case, row in rows.items() if case.startswith(dtype)}
        measured = [row for row in mine.values() if "worst" in row]
        bad = [case for case, row in mine.items() if row.get("passed") is False]
        worst = f"{max((row['worst'] for row in measured), default=float('nan')):.2f}"
        missing = str(len(mine) - len(measured))
        lines.append([dtype, str(len(measured)), missing, worst, "; ".join(bad) or "none"])
    return table(["dtype", "checks", NOT_MEASURED, "worst, times eager's error", "failed"], lines)


def gpu_micro(sections: Sections) -> str:
    rows = rows_of(sections, "micro")
    peak = rows.get("machine", {})
    lines = []
    for case, row in rows.items():
        if case == "machine":
            continue
        if why := failed(row):
            lines.append([case, why, "", ""])
            continue
        share = roofline.floor_ms(row["flops"], row["bytes"], peak) if "flops" in row else None
        reached = "" if share is None else f"{share / row['ms']['kronbert']['median_ms']:.0%}"
        lines.append([case, ms(row, "kronbert"), times(row["ratio"]["kronbert"]), reached])
    head = ["op, bf16", "kronbert, ms", "times as fast as dense eager", "of the floor's speed"]
    return table(head, lines)


def gpu_models(sections: Sections, *names: str) -> str:
    lines = []
    for name in names:
        for case, row in rows_of(sections, name).items():
            if why := failed(row):
                lines.append([name, case, why, "", ""])
                continue
            shown = ", ".join(f"{key} {ratio:.2f}x" for key, ratio in row["ratio"].items())
            peak = row.get("peak_above_model_bytes") or {}
            memory = ", ".join(f"{key} {size / 2**30:.2f} GiB" for key, size in peak.items())
            lines.append([name, case, ms(row, "dense"), shown, memory])
    head = [
        "",
        "",
        "dense eager, ms",
        "times as fast as dense eager",
        "peak memory above the model",
    ]
    return table(head, lines)


def gpu_encoder(sections: Sections) -> str:
    return gpu_models(sections, "encoder", "graphs")


def gpu_training(sections: Sections) -> str:
    return gpu_models(sections, "training")


TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[Sections], str]]] = {
    # A table's name -> its file, the sections it needs, and what writes it.
    "cpu_encoder": ("speed_cpu.json", ("encoder",), cpu_encoder),
    "cpu_encoder_avx2": ("speed_cpu_avx2.json", ("encoder",), cpu_encoder),
    "cpu_kernels": ("speed_cpu_avx2.json", ("kernels",), cpu_kernels),
    "cpu_compile": ("speed_cpu.json", ("encoder",), cpu_compile),
    "cpu_micro": ("speed_cpu.json", ("micro",), cpu_micro),
    "cpu_micro_backward": ("speed_cpu.json", ("micro",), cpu_micro_backward),
    "cpu_training": ("speed_cpu.json", ("training",), cpu_training),
    "cpu_onnx": ("speed_cpu.json", ("onnx",), cpu_onnx),
    "cpu_never_slower": ("speed_cpu_plans.json", ("never_slower",), cpu_never_slower),
    "gpu_correctness": ("speed_gpu.json", ("correctness",), gpu_correctness),
    "gpu_micro": ("speed_gpu.json", ("micro",), gpu_micro),
    "gpu_encoder": ("speed_gpu.json", ("encoder", "graphs"), gpu_encoder),
    "gpu_training": ("speed_gpu.json", ("training",), gpu_training),
}


def rewritten(text: str, results: Path) -> str:
    """The page with every table made anew from the files in ``results``."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        file, needed, write = TABLES[name]
        sections = load(results / file)
        measured = any(rows_of(sections, one) for one in needed)
        body = write(sections) + source(sections, needed[0], file) if measured else NOT_MEASURED
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def load(file: Path) -> dict[str, Any]:
    """The sections of a file, none when it is not there; a quick run's figures are refused."""
    if not file.is_file():
        return {}
    content = read(file)
    if content["quick"]:
        sys.exit(f"{file.name} holds a --quick run: its figures say nothing. Measure in full.")
    sections = dict(content["sections"])
    for section in sections.values():
        section["command"] = content["command"]
    return sections


def source(sections: Sections, name: str, file: str) -> str:
    """Where a table's figures come from, as a last line."""
    section = sections[name]
    found = section["environment"]
    machine = (
        found.get("gpu") or f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"
    )
    rows = section["rows"].values()
    commits = dict.fromkeys(row["commit"] for row in rows if "commit" in row)
    return (
        f"\n\n{machine}; torch {found['torch']}, transformers {found['transformers']}; {file}, "
        f"made with `{section['command']}` at {', '.join(commits)}. Milliseconds: median "
        "(20th-80th percentile)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "examples" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "speed.md")
    parser.add_argument("--check", action="store_true", help="only compare the page")
    options = parser.parse_args()
    before = options.page.read_text()
    after = rewritten(before, options.results)
    if options.check:
        sys.exit(
            None if after == before else f"{options.page.name} differs from its results: run me."
        )
    options.page.write_text(after)
    micro = rows_of(load(options.results / "speed_cpu.json"), "micro")
    if any(row.get("flops") for row in micro.values()):
        roofline.draw(micro, options.page.with_name("speed_roofline.png"))


if __name__ == "__main__":
    main()
