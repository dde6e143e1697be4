"""Checks and times kronbert on a CUDA device: ``python -m kronbert.bench_gpu --out FILE``.

First whether every fused op is right, forward and backward, in fp32, fp16 and bf16; then times of
ops beside what the memory and the tensor cores allow, of BERT-base, of batch 1 under CUDA graphs,
and of forward with backward. Each row is written when it is done; a run that ran into its limit
goes on from the same file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import kronbert

from . import bench_checks
from .bench_checks import Dense, Op
from .bench_models import DTYPES, bert_base, cast, inputs, saved_for_backward
from .bench_results import Case, Results, brief, timed_row
from .latency import Timing, compare

NO_DEVICE = (
    "No CUDA device: torch.cuda.is_available() is False. Run it on a machine with a GPU and a CUDA "
    "build of torch; on a CPU, examples/bench_cpu.py."
)

FLUSH_BYTES = 2**29
"""Written before every sample of an op: ten times an H200's cache (50 MB)."""

HEAD_START_CYCLES = 4_000_000
"""About 2 ms in which the device sleeps while Python enqueues the op, so that launch overhead is
not counted: the micro section asks what the kernels cost, the encoder section what a user waits."""

PRESETS = ("k21", "k8")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run; a test runs it small and on a CPU."""

    device: str = "cuda"
    layers: int = 12
    batch: int = 128
    sequence: int = 128
    width: int = 768
    entries: int = 30522
    tokens: tuple[int, ...] = (16384, 4096)
    check_rows: tuple[int, ...] = (1, 17, 300)
    seconds: float = 2.0
    compiled: bool = True


def correctness(sizes: Sizes) -> Iterator[Case]:
    """Every fused op against its definition in float64, its rounding against eager's."""
    for dtype in ("bf16", "fp32", "fp16"):
        ops = bench_checks.all_checks(
            sizes.check_rows, width=sizes.width, entries=min(sizes.entries, 1024)
        )
        for name, op in ops:
            yield f"{dtype} {name}", partial(_checked, op, sizes.device, DTYPES[dtype])


def _checked(op: Op, device: str, dtype: torch.dtype) -> dict[str, Any]:
    found = bench_checks.check(op, device, dtype)
    # 1,000 rows of figures that are right say no more than their worst does.
    return found if not found["passed"] else {k: found[k] for k in ("passed", "worst", "where")}


def micro(sizes: Sizes) -> Iterator[Case]:
    """Fused ops, the dense ops they replace, and their floors, in bf16."""
    yield "machine", partial(machine_rates, sizes)
    for tokens in sizes.tokens:
        for name in PRESETS:
            groups = bench_checks.linear_maps(sizes.width)
            for layer in ("attention", "expand", "contract"):
                op = bench_checks.make("kron_linear", {"map": groups[f"{name} {layer}"]}, tokens)
                yield from _both_ways(f"kron_linear {name} {layer} {tokens} tokens", op, sizes)
            for op in bench_checks.block_ops(
                name, tokens, width=sizes.width, entries=sizes.entries
            ):
                gelu = ", gelu fast" if op.fast_gelu else ""
                yield from _both_ways(f"{op.name} {name} {tokens} tokens{gelu}", op, sizes)


def _both_ways(name: str, op: Op, sizes: Sizes) -> Iterator[Case]:
    yield f"{name}, forward", partial(op_row, op, sizes, backward=False)
    yield f"{name}, forward+backward", partial(op_row, op, sizes, backward=True)


def op_row(op: Op, sizes: Sizes, *, backward: bool) -> dict[str, Any]:
    """ms of the fused op and of its dense twin; the floor's two parts, for forward alone."""
    given = op.to(sizes.device, torch.bfloat16)
    dense = Dense(given)
    ours = partial(op.fused, given)
    theirs = partial(op.plain, given, dense)
    if backward:
        seeds = [torch.randn_like(one) for one in bench_checks.outputs(ours())]
        leaves = list(given.values())
        calls = {
            # The dense twin's weights take the place of the matrices, which it does not use.
            "dense": partial(_there_and_back, theirs, [*leaves, *dense.weights.values()], seeds),
            "kronbert": partial(_there_and_back, ours, leaves, seeds),
        }
        return timed_row(device_times(calls, sizes), "dense")
    with torch.no_grad():
        row = timed_row(device_times({"dense": theirs, "kronbert": ours}, sizes), "dense")
    return row | {"flops": op.flops, "bytes": 2 * op.moved}


def _there_and_back(forward: Callable[[], Any], leaves: list[Tensor], seeds: list[Tensor]) -> None:
    torch.autograd.grad(bench_checks.outputs(forward()), leaves, seeds, allow_unused=True)


def device_times(
    calls: Mapping[str, Callable[[], object]], sizes: Sizes, rounds: int = 50
) -> dict[str, Timing]:
    """Time on the device of each call, in turns, by CUDA events, with the cache flushed before."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=sizes.device)
    for function in calls.values():
        for _ in range(3):
            function()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = perf_counter()
    while (done := len(next(iter(samples.values())))) < rounds:
        if done >= 10 and perf_counter() - start > sizes.seconds:
            break
        for name, function in calls.items():
            flush.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            function()
            after.record()
            after.synchronize()
            samples[name].append(before.elapsed_time(after))
    return {name: Timing.of(tuple(values)) for name, values in samples.items()}


def machine_rates(sizes: Sizes) -> dict[str, Any]:
    """The floors: the fastest dense bf16 product (FLOP/s) and copy (bytes/s, read and write)."""
    n = 8192
    a, b = (torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    calls = {"product": partial(torch.matmul, a, b), "copy": partial(target.copy_, source)}
    found = device_times(calls, sizes)
    return {
        "flop_per_s": 2e3 * n**3 / min(found["product"].samples_ms),
        "bytes_per_s": 2e3 * source.numel() / min(found["copy"].samples_ms),
    }


def encoder(sizes: Sizes) -> Iterator[Case]:
    """BERT-base without pooler, bf16, inference: dense and students, eager and compiled."""
    models = Models(sizes)
    for name in PRESETS:
        kinds = {"dense": "dense", "not fused": name, "fused": f"{name} fused"}
        yield f"{name} eager", partial(encoder_row, models, kinds, {})
    if not sizes.compiled:
        return
    for name in PRESETS:
        kinds = {"dense": "dense", "dense compiled": "dense", "fused compiled": f"{name} fused"}
        modes = {"dense compiled": "default", "fused compiled": "default"}
        yield f"{name} torch.compile", partial(encoder_row, models, kinds, modes)
    for name in PRESETS:
        kinds = {"dense": "dense", "fused reduce-overhead": f"{name} fused"}
        modes = {"fused reduce-overhead": "reduce-overhead"}
        yield f"{name} reduce-overhead", partial(encoder_row, models, kinds, modes)
    kinds = {"dense": "dense", "dense max-autotune": "dense"}
    kinds |= {f"{name} fused": f"{name} fused" for name in PRESETS}
    modes = {"dense max-autotune": "max-autotune"}
    yield "beside max-autotune", partial(encoder_row, models, kinds, modes)


class Models:
    """The dense encoder, each student and its fused twin, in bf16, made at first use."""

    def __init__(self, sizes: Sizes, labels: int | None = None) -> None:
        self.sizes, self.labels = sizes, labels
        self.made: dict[str, nn.Module] = {}

    def get(self, kind: str) -> nn.Module:
        """kind: "dense", a preset, or a preset and " fused"; the fast GELU, made for bf16."""
        if kind not in self.made:
            name, _, fused = kind.partition(" ")
            dense = bert_base(layers=self.sizes.layers, labels=self.labels)
            model = dense if name == "dense" else kronbert.convert(dense, preset=name)
            model = cast(model.eval(), torch.bfloat16, self.sizes.device)
            self.made[kind] = kronbert.fuse(model, gelu="fast") if fused else model
        return self.made[kind]


def encoder_row(
    models: Models, kinds: Mapping[str, str], modes: Mapping[str, str]
) -> dict[str, Any]:
    """What a user waits for: the clock around a call and a synchronisation.

    kinds: a run's name -> a kind of `Models`; modes: a run's name -> a mode of torch.compile."""
    sizes = models.sizes
    given = inputs(models.get("dense"), sizes.batch, sizes.sequence, sizes.device)
    torch.compiler.reset()
    calls: dict[str, Callable[[], Any]] = {}
    for name, kind in kinds.items():
        model: Any = models.get(kind)
        if name in modes:
            model = torch.compile(model, mode=modes[name])
        calls[name] = partial(_infer, model, given)
    return timed_row(compare(calls, seconds=sizes.seconds * len(calls)), "dense")


def _infer(model: Any, given: dict[str, Tensor]) -> Any:
    with torch.inference_mode():
        return model(**given)


def training(sizes: Sizes) -> Iterator[Case]:
    """Forward and backward of a two-class BERT-base, dropout on, bf16: time and peak memory."""
    models = Models(sizes, labels=2)
    for name in PRESETS:
        kinds = {"dense": "dense", "not fused": name, "fused": f"{name} fused"}
        yield f"{name} forward+backward", partial(training_row, models, kinds)


def training_row(models: Models, kinds: Mapping[str, str]) -> dict[str, Any]:
    sizes = models.sizes
    given = inputs(models.get("dense"), sizes.batch, sizes.sequence, sizes.device)
    labels = torch.zeros(sizes.batch, dtype=torch.long, device=sizes.device)
    calls, peak, kept = {}, {}, {}
    for name, kind in kinds.items():
        model = models.get(kind).train()

        def step(model: nn.Module = model) -> None:
            model(**given, labels=labels).loss.backward()
            model.zero_grad(set_to_none=True)

        step()
        with saved_for_backward(model) as counted:
            loss = model(**given, labels=labels).loss
        kept[name] = counted["bytes"]
        del loss
        if sizes.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak[name] = torch.cuda.max_memory_allocated() - before
        calls[name] = step
    row = timed_row(compare(calls, seconds=sizes.seconds * len(calls)), "dense")
    return row | {"saved_for_backward_bytes": kept, "peak_above_model_bytes": peak}


def graphs(sizes: Sizes) -> Iterator[Case]:
    """Batch 1, bf16: eager, and replayed as one CUDA graph."""
    models = Models(sizes)
    for name in PRESETS:
        yield f"{name} batch 1", partial(graph_row, models, name)


def graph_row(models: Models, name: str) -> dict[str, Any]:
    sizes = models.sizes
    given = inputs(models.get("dense"), 1, sizes.sequence, sizes.device)
    calls: dict[str, Callable[[], Any]] = {}
    for label, kind in (("dense", "dense"), ("fused", f"{name} fused")):
        run = partial(_infer, models.get(kind), given)
        calls[label] = run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up off the default stream, as capture asks for
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = run()
        calls[f"{label} graph"] = partial(_replay, graph, held)
    return timed_row(compare(calls, seconds=sizes.seconds), "dense")


def _replay(graph: Any, held: Any) -> Any:
    """held: the graph's outputs, kept so that their memory is not given to anybody else."""
    graph.replay()
    return held


SECTIONS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "correctness": correctness,
    "micro": micro,
    "encoder": encoder,
    "training": training,
    "graphs": graphs,
}


UNTIL = {"correctness": 0.4, "micro": 0.6, "encoder": 0.85, "training": 0.95, "graphs": 1.0}
"""The part of the time limit after which a section, run with the others, begins no row: compiling
kernels in every dtype must not leave the encoder without any."""


def run(results: Results, names: list[str], sizes: Sizes, seconds: float) -> int:
    """Measure the sections and print a table; 0, or 1 when a check failed or a row has an error."""
    start = results.clock()
    for name in names:
        part = UNTIL[name] if len(names) > 1 else 1.0
        say = _only_failures if name == "correctness" else print
        results.section(name, SECTIONS[name](sizes), deadline=start + part * seconds, say=say)
    lines, failed = summary(results.content["sections"])
    print("\n".join(lines))
    return int(failed)


def _only_failures(line: str) -> None:
    if "passed True" not in line:
        print(line)


def summary(sections: Mapping[str, Any]) -> tuple[list[str], bool]:
    """A line per row, of correctness one in all and one per failure; whether anything failed."""
    lines, failed = [], False
    for name, section in sections.items():
        rows = section["rows"]
        bad = [case for case, row in rows.items() if "error" in row or row.get("passed") is False]
        failed = failed or bool(bad)
        if name == "correctness":
            worst = max((row["worst"] for row in rows.values() if "worst" in row), default=0.0)
            lines.append(f"correctness: {len(rows) - len(bad)} of {len(rows)} right, worst {worst}")
            rows = {case: rows[case] for case in bad}
        peak = rows.get("machine", {})
        for case, row in rows.items():
            share = floor_share(row, peak)
            end = "" if share is None else f", {share:.0%} of the floor's speed"
            lines.append(f"{name}: {case}: {brief(row)}{end}")
    return lines, failed


def floor_share(row: Mapping[str, Any], peak: Mapping[str, float]) -> float | None:
    """The least time the machine needs over the time taken; None for rows without a floor."""
    if "flops" not in row or "flop_per_s" not in peak:
        return None
    least = max(row["flops"] / peak["flop_per_s"], row["bytes"] / peak["bytes_per_s"])
    return 1e3 * least / float(row["ms"]["kronbert"]["median_ms"])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kronbert.bench_gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON to write and to go on with")
    parser.add_argument("--seconds-limit", type=float, default=540, help="no row begins after it")
    parser.add_argument("--only", choices=list(SECTIONS), help="one section")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # fp32 is compared with fp32, not with TF32
    results = Results(
        options.out,
        command=f"python -m kronbert.bench_gpu --out {options.out.name}",
        device="cuda",
        commit=options.commit,
    )
    names = [options.only] if options.only else list(SECTIONS)
    return run(results, names, Sizes(), options.seconds_limit)


if __name__ == "__main__":
    sys.exit(main())
