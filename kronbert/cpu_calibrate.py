"""Measures the primitives of `kronbert.cpu_cost` on this machine and keeps them in a file.

The file lies in the user's cache folder, one for each processor, number of threads and version of
torch. Without one, tables measured elsewhere are used: they ship with the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from math import prod
from pathlib import Path
from time import perf_counter

import torch

from . import native
from .cpu_cost import CostTable, Grid, Primitive, load_tables, shipped_tables
from .errors import CheckpointError, ReportError
from .forms import packed, plain_product

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

WIDTHS = (2, 8, 32, 96, 192, 384, 768, 1536, 3072)
"""Widths that layers and their slices have; between powers of two products run differently."""

GEMM: Grid = ((1, 2, 3, 4, 16, 64, 256, 1024, 8192, 131072), WIDTHS, WIDTHS)
MIX: Grid = ((1, 16, 128, 1024), (2, 8, 32, 128), (2, 8, 32, 128), (2, 8, 32, 128, 512))
TURN: Grid = ((1024, 32768, 131072, 1048576), (2, 16, 96, 384), (2, 16, 96, 384))
ADD: Grid = ((1024, 32768, 1048576, 4194304),)

MOST_WORK, MOST_NUMBERS = 2**31, 2**25
"""Multiplications of one product and numbers in one operand; a larger one is scaled from a smaller
one of the same kind."""

SAMPLE_S, SAMPLES = 4e-4, 5
"""Seconds of one sample at least, and samples per point: about 25 s for both dtypes."""


def calibrate(path: Path | None = None) -> Path:
    """Measure the tables and write them to ``path`` (default: `cache_file`); nothing else may run.

    Returns the file. It is used by every later process with the same processor, number of threads,
    torch and row kernels."""
    path = path or cache_file()
    found = {name: measure(dtype).to_json() for name, dtype in DTYPES.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        part = Path(scratch, path.name)
        part.write_text(json.dumps({"machine": machine(), "tables": found}))
        part.replace(path)
    return path


def machine() -> dict[str, str | int]:
    """What the times depend on: processor, its best instructions, threads, torch, row kernels."""
    from .latency import cpu_name

    return {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": native.source(),
    }


def cache_folder() -> Path:
    """Where what was made on this machine lies: KRONBERT_CACHE, else the user's cache folder;
    `CheckpointError` for a user without a home."""
    base = os.environ.get("KRONBERT_CACHE")
    if base:
        return Path(base)
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "kronbert"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kronbert"
    except RuntimeError as error:
        raise CheckpointError(
            "cache folder: this user has no home. Name a folder by KRONBERT_CACHE."
        ) from error


def cache_file() -> Path:
    """This machine's tables, in `cache_folder`."""
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"cpu-{key}.json"


def tables() -> tuple[dict[str, CostTable], Path | None]:
    """The calibrated tables of this machine, else the shipped ones; and the file if it is damaged.

    A cache folder that this user has not, or may not read, holds none. Without AMX the shipped
    bfloat16 table does not hold: float32's ratios are nearer."""
    damaged = None
    with suppress(CheckpointError):
        path = cache_file()
        if os.path.isfile(path):  # Path.is_file raises where a folder above may not be read
            try:
                return load_tables(path), None
            except ReportError:
                damaged = path
    shipped = shipped_tables()
    if not torch.cpu._is_amx_tile_supported():
        shipped = {name: shipped["float32"] for name in shipped}
    return shipped, damaged


@torch.inference_mode()
def measure(dtype: torch.dtype) -> CostTable:
    """Every primitive on its grid in ``dtype``."""

    def gemm(m: int, n: int, k: int) -> Callable[[], object]:
        x, weight = _random(dtype, m, k), packed(_random(dtype, n, k), m)
        return lambda: plain_product(x, weight)

    def mix(batch: int, p: int, q: int, width: int) -> Callable[[], object]:
        small, slices = _random(dtype, p, q), _random(dtype, batch, q, width)
        if width % native.LANES == 0 and q <= native.SLICES and native.library() is not None:
            matrix = small.float()
            return lambda: native.mix(slices, matrix, None)
        return lambda: torch.bmm(small.expand(batch, -1, -1), slices)

    def turn(elements: int, p: int, q: int) -> Callable[[], object]:
        x = _random(dtype, max(1, elements // (p * q)), p, q)
        return lambda: x.transpose(1, 2).contiguous()

    def add(elements: int) -> Callable[[], object]:
        x, bias = _random(dtype, elements // 256, 256), _random(dtype, 256)
        return lambda: x.add_(bias)

    return CostTable(
        dtype.itemsize,
        *(_times(*of) for of in ((gemm, GEMM), (mix, MIX), (turn, TURN), (add, ADD))),
    )


def _times(make: Callable[..., Callable[[], object]], grid: Grid) -> Primitive:
    """Times of ``make(*sizes)`` over the grid; work beyond `MOST_WORK` is scaled, along axis 0."""
    times: dict[tuple[int, ...], float] = {}
    for sizes in product(*grid):
        smaller = (grid[0][max(grid[0].index(sizes[0]) - 1, 0)], *sizes[1:])
        large = prod(sizes) > MOST_WORK or sizes[0] * max(sizes[1:], default=1) > MOST_NUMBERS
        if large and smaller in times:
            times[sizes] = times[smaller] * sizes[0] / smaller[0]
        else:
            times[sizes] = _time_us(make(*sizes))
    return Primitive(grid, tuple(times[sizes] for sizes in product(*grid)))


def _time_us(call: Callable[[], object]) -> float:
    """The fastest of a few samples: what else the machine does only ever slows one."""
    call()
    start = perf_counter()
    call()
    once = perf_counter() - start
    if once > 0.03:
        return 1e6 * once
    calls = max(1, int(SAMPLE_S / once))
    best = once
    for _ in range(SAMPLES):
        start = perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (perf_counter() - start) / calls)
    return 1e6 * best


def _random(dtype: torch.dtype, *size: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=random, device="cpu").to(dtype)
