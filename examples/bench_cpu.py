"""Times kronbert on a CPU beside what it replaces and what else there is: writes speed_cpu.json.

    python examples/bench_cpu.py --out examples/results/speed_cpu.json --part all

Everything is timed in one process, in turns; run nothing else beside it. A run that was stopped
goes on where it stopped. --quick: few cases and a BERT of two layers, to see that it works.

parts: micro (one linear map), encoder (BERT-base), training (one step), onnx (ONNX Runtime's dense
fp32 and int8), never_slower (every map of a plan at 1 to 16,384 rows, against `nn.Linear`), kernels
(the row kernels in C with vectors of one register, and of 16 numbers).
Peers that are not installed are left out by name: pip install -e ".[bench]", and for pyfastkron
pip install --no-deps pyfastkron.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

import kronbert
from kronbert import native
from kronbert.bench_models import (
    DTYPES,
    MINILM,
    bert_base,
    cast,
    inputs,
    saved_for_backward,
    student,
    training_step,
)
from kronbert.bench_results import Case, Results, timed_row
from kronbert.latency import compare
from kronbert.shapes import Groups, KroneckerShape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "benchmarks"))
import onnx_peer  # type: ignore[import-not-found]
import peers  # type: ignore[import-not-found]

PRESETS = ("k8", "k19", "k21")

LONGEST_ROUND_MS = 10_000
"""An encoder case whose models together take longer per call is left out."""


def micro(quick: bool) -> Iterator[Case]:
    """One linear map of each preset, forward and forward with backward, beside every peer."""
    for dtype in ("fp32", "bf16"):
        yield f"machine {dtype}", partial(machine_rates, DTYPES[dtype])
    presets = ("k21",) if quick else ("k5", "k8", "k21")  # K19's linear maps are K21's
    layers = ("attention",) if quick else tuple(peers.LAYERS)
    for rows in (128,) if quick else (128, 4096):
        for dtype in ("fp32", "bf16"):
            for name in presets:
                for layer in layers:
                    for backward in (False, True):
                        way = "forward+backward" if backward else "forward"
                        case = f"{name} {layer} {rows} rows {dtype} {way}"
                        shape = peers.layer_shape(name, layer)
                        yield case, partial(micro_row, shape, rows, dtype, backward, quick)


def micro_row(
    shape: KroneckerShape, rows: int, dtype: str, backward: bool, quick: bool
) -> dict[str, Any]:
    problem = peers.Problem.random(shape, rows, DTYPES[dtype], backward=backward)
    calls, absent = peers.ready(problem)
    timings, ratios = peers.timed(calls, seconds=0.05 if quick else 0.5)
    size = problem.x.element_size()
    weights = shape.parameters + shape.out_features
    dense_weights = (shape.in_features + 1) * shape.out_features
    row = timed_row({name: timings[name] for name in calls}, peers.OURS, over=())
    return row | {
        "ratio": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "absent": absent,
        "shape": shape.spec,
        "flops": rows * shape.flops(),
        "dense_flops": rows * 2 * shape.in_features * shape.out_features,
        "bytes": size * (rows * (shape.in_features + shape.out_features) + weights),
        "dense_bytes": size * (rows * (shape.in_features + shape.out_features) + dense_weights),
    }


def machine_rates(dtype: torch.dtype) -> dict[str, Any]:
    """The machine's floors: the best dense product (FLOP/s) and copy (bytes/s, read and write)."""
    best = 0.0
    for n, inner, out in ((4096, 768, 3072), (4096, 3072, 768), (2048, 2048, 2048)):
        x, weight = torch.randn(n, inner).to(dtype), torch.randn(out, inner).to(dtype)
        ms = peers.best_ms(partial(F.linear, x, weight))
        best = max(best, 2e3 * n * inner * out / ms)
    source = torch.ones(2**26)  # 256 MiB, far beyond any cache
    copy_ms = peers.best_ms(partial(torch.zeros_like(source).copy_, source))
    return {"flop_per_s": best, "bytes_per_s": 2e3 * source.nbytes / copy_ms}


def encoder(quick: bool) -> Iterator[Case]:
    """BERT-base without pooler in inference mode, and its students, in turns."""
    sizes = [(1, 128)] if quick else [(1, 128), (8, 128), (32, 128)]
    later = [] if quick else [(1, 16), (1, 512), (8, 512), (128, 128)]
    models = Models(quick)
    for batch, sequence in sizes + later:
        for dtype in ("fp32", "bf16"):
            case = f"batch {batch} sequence {sequence} {dtype}"
            yield case, partial(encoder_row, models, batch, sequence, dtype, quick)
    for batch in (1,) if quick else (1, 8):
        case = f"batch {batch} sequence 128 fp32 torch.compile"
        yield case, partial(compiled_row, models, batch, "default", quick)
    if not quick:
        yield (
            "batch 1 sequence 128 fp32 torch.compile max-autotune",
            partial(compiled_row, models, 1, "max-autotune", quick),
        )


class Models:
    """The dense encoder and its students, made at first use and kept for every case."""

    def __init__(self, quick: bool) -> None:
        self.layers = 2 if quick else 12
        self.made: dict[tuple[str, str], nn.Module] = {}

    def get(self, name: str, dtype: str) -> nn.Module:
        """name: "dense" or a preset."""
        if (name, dtype) not in self.made:
            if dtype != "fp32":
                made = cast(self.get(name, "fp32"), DTYPES[dtype])
            elif name == "dense":
                made = bert_base(layers=self.layers)
            else:
                made = student(self.get("dense", "fp32"), name)
            self.made[name, dtype] = made
        return self.made[name, dtype]


def runs(models: Mapping[str, Any], given: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    def run(model: Any) -> Any:
        with torch.inference_mode():
            return model(**given)

    return {name: partial(run, model) for name, model in models.items()}


def encoder_row(
    models: Models, batch: int, sequence: int, dtype: str, quick: bool
) -> dict[str, Any]:
    chosen = {name: models.get(name, dtype) for name in ("dense", *PRESETS)}
    calls = runs(chosen, inputs(chosen["dense"], batch, sequence))
    if batch * sequence > 8192:
        once = sum(peers.best_ms(call, calls=1) for call in calls.values())
        if once > LONGEST_ROUND_MS:
            limit = LONGEST_ROUND_MS // 1000
            return {"left_out": f"one round takes {once / 1e3:.0f} s, over the limit of {limit} s"}
    return timed_row(compare(calls, seconds=1 if quick else 10), "dense")


def compiled_row(models: Models, batch: int, mode: str, quick: bool) -> dict[str, Any]:
    """The dense model and the k21 student as they are and compiled. `torch.compile` of the fused
    student may have nothing to add."""
    chosen: dict[str, Any] = {name: models.get(name, "fp32") for name in ("dense", "k21")}
    torch.compiler.reset()
    compiled = {
        f"{name} compiled": torch.compile(model, mode=mode) for name, model in chosen.items()
    }
    calls = runs({**chosen, **compiled}, inputs(chosen["dense"], batch, 128))
    return timed_row(compare(calls, seconds=1 if quick else 10), "dense")


def training(quick: bool) -> Iterator[Case]:
    """One step of a two-class BERT-base, dropout on: forward, backward, AdamW; and its memory."""
    batch = 4 if quick else 32
    for dtype in ("fp32", "bf16"):
        for name in ("k21",) if quick else ("k8", "k21"):
            case = f"{name} batch {batch} sequence 128 {dtype}"
            yield case, partial(training_row, name, batch, dtype, quick)


def training_row(name: str, batch: int, dtype: str, quick: bool) -> dict[str, Any]:
    dense = bert_base(layers=2 if quick else 12, labels=2)
    models = {"dense": dense, name: student(dense, name)}
    models = {key: cast(model, DTYPES[dtype]) for key, model in models.items()}
    given = inputs(dense, batch, 128)
    kept = {}
    for key, model in models.items():
        with saved_for_backward(model.train()) as counted:
            loss = model(**given, labels=torch.zeros(batch, dtype=torch.long)).loss
        kept[key] = counted["bytes"]
        del loss
    steps = {key: training_step(model, given) for key, model in models.items()}
    return timed_row(compare(steps, seconds=1 if quick else 30), "dense") | {
        "saved_for_backward_bytes": kept,
        "parameters": {key: sum(p.numel() for p in m.parameters()) for key, m in models.items()},
    }


def onnx(quick: bool) -> Iterator[Case]:
    """The k21 student in both dtypes beside ONNX Runtime's dense fp32 and dynamic int8."""
    models = Models(quick)
    with tempfile.TemporaryDirectory() as folder:
        for batch in (1,) if quick else (1, 8):
            case = f"batch {batch} sequence 128"
            yield case, partial(onnx_row, models, batch, Path(folder), quick)


def onnx_row(models: Models, batch: int, folder: Path, quick: bool) -> dict[str, Any]:
    dense = models.get("dense", "fp32")
    given = inputs(dense, batch, 128)
    with torch.inference_mode():
        expected = dense(**given).last_hidden_state
    calls: dict[str, Callable[[], Any]] = {}
    errors = {}
    for kind in ("fp32", "int8"):
        session = onnx_peer.session(dense, given, folder, kind)
        got = torch.from_numpy(onnx_peer.run(session, given))
        errors[f"onnxruntime {kind}"] = float((got - expected).norm() / expected.norm())
        calls[f"onnxruntime {kind}"] = partial(onnx_peer.run, session, given)
    if not errors["onnxruntime fp32"] < 1e-3:
        raise ArithmeticError(f"the exported model is off by {errors['onnxruntime fp32']:.1e}")
    calls |= runs({"dense": dense}, given)
    for dtype in ("fp32", "bf16"):
        calls |= runs({f"k21 {dtype}": models.get("k21", dtype)}, given)
    timings = compare(calls, seconds=1 if quick else 15)
    row = timed_row(timings, "dense")
    for kind in ("fp32", "int8"):
        ours = timed_row(timings, f"onnxruntime {kind}", over=("k21 fp32", "k21 bf16"))["ratio"]
        row[f"ratio_to_onnxruntime_{kind}"] = ours
    return row | {"relative_error": errors, "versions": onnx_peer.versions()}


def never_slower(quick: bool) -> Iterator[Case]:
    """Every distinct linear map of a model's plans at 1 to 16,384 rows, against `nn.Linear`."""
    all_rows = (1, 64) if quick else (1, 4, 16, 128, 1024, 4096, 16384)
    for model, config in (("BERT-base", BertConfig()), ("MiniLM-L6", BertConfig(**MINILM))):
        for (out, inner), groups in planned_maps(config, quick):
            for dtype in ("fp32", "bf16"):
                shown = " + ".join(shape.spec for shape in groups)
                for rows in all_rows:
                    case = f"{model} {out}x{inner} {shown} {rows} rows {dtype}"
                    yield case, partial(slower_row, groups, rows, dtype, quick)


def planned_maps(config: BertConfig, quick: bool) -> list[tuple[tuple[int, int], Groups]]:
    """(out, inner) and the groups of each different linear map in plans for this model."""
    wanted: list[dict[str, Any]] = [{"preset": name} for name in ("k5", "k8", "k21")]
    wanted += [{"factor": factor} for factor in (2, 8, 19)]
    found: dict[tuple[tuple[int, int], Groups], None] = {}
    for options in wanted[2:3] if quick else wanted:
        for layer in kronbert.plan(config, **options).converted:
            if layer.size.kind == "linear":
                found[(layer.size.out, layer.size.inner), layer.groups] = None
    return list(found)


def slower_row(groups: Groups, rows: int, dtype: str, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    inner, out = groups[0].in_features, groups[0].out_features
    ours = kronbert.KroneckerLinear(inner, out, groups, dtype=DTYPES[dtype]).eval()
    dense = ours.to_linear()
    x = torch.randn(rows, inner).to(DTYPES[dtype])

    def run(module: nn.Module) -> Tensor:
        with torch.inference_mode():
            return module(x)

    calls = {"nn.Linear": partial(run, dense), "kronbert": partial(run, ours)}
    return timed_row(compare(calls, seconds=0.05 if quick else 0.15), "nn.Linear")


def kernels(quick: bool) -> Iterator[Case]:
    """BERT-base and its students by the vectors of the row kernels in C: as wide as this machine's
    registers, and of 16 numbers, which gcc keeps in memory where no register holds as many."""
    models = Models(quick)
    for batch, sequence in [(1, 128)] if quick else [(1, 128), (8, 128), (1, 16), (8, 512)]:
        for name in ("k21",) if quick else ("k8", "k21"):
            case = f"{name} batch {batch} sequence {sequence} fp32"
            yield case, partial(kernels_row, models, name, batch, sequence, quick)


def kernels_row(
    models: Models, name: str, batch: int, sequence: int, quick: bool
) -> dict[str, Any]:
    dense = models.get("dense", "fp32")
    given = inputs(dense, batch, sequence)
    calls = runs({"dense": dense}, given)
    (call,) = runs({name: models.get(name, "fp32")}, given).values()
    for kind, library in libraries().items():

        def run(library: Any = library) -> Any:
            with patch.object(native, "library", lambda: library):
                return call()

        calls[kind] = run
    return timed_row(compare(calls, seconds=1 if quick else 10), "dense")


@cache
def libraries() -> dict[str, ctypes.CDLL]:
    """The row kernels by the width of their vectors, in a cache folder of this process's own."""
    build = native.library.__wrapped__
    with tempfile.TemporaryDirectory() as folder, patch.dict("os.environ", KRONBERT_CACHE=folder):
        own = build()
        with patch.object(native, "FLAGS", (*native.FLAGS, "-DLANES=16")):
            wide = build()
    if own is None or wide is None:
        raise RuntimeError("no row kernels here: off Linux, no C compiler, or turned off")
    return {"one register": own, "16 numbers": wide}


PARTS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "micro": micro,
    "encoder": encoder,
    "training": training,
    "onnx": onnx,
    "never_slower": never_slower,
    "kernels": kernels,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON to write and to go on with")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="to see that it works")
    options = parser.parse_args()
    words = "--quick " if options.quick else ""
    results = Results(
        options.out,
        command=f"python examples/bench_cpu.py {words}--out {options.out.name} --part all",
        quick=options.quick,
    )
    for name in PARTS if options.part == "all" else [options.part]:
        results.section(name, PARTS[name](options.quick))


if __name__ == "__main__":
    main()
