"""How long functions and models take, timed side by side in one process, and on what machine."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import inspect
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ReportError
from .prepared import own_forward

WARM_UP = 2
"""Untimed calls of each function: allocations, thread pools and kernel choice settle in them."""

FEWEST_ROUNDS = 5
"""Below it a median and two quantiles say little, however slow the functions are."""

SHORTEST_SAMPLE_MS = 0.5
"""Faster functions are called several times per sample, so that the clock's own cost (0.1 us), and
on CUDA the synchronisation (10 us), stay below a few percent."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds per call: the median and its spread (20th and 80th percentile).

    samples_ms: one value per round, in order; those of functions compared together are pairs."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples_ms: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, samples_ms: tuple[float, ...]) -> Timing:
        low = high = samples_ms[0]
        if len(samples_ms) > 1:
            low, *_, high = quantiles(samples_ms, n=5, method="inclusive")
        return cls(median_ms=median(samples_ms), p20_ms=low, p80_ms=high, samples_ms=samples_ms)

    def to_json(self) -> dict[str, Any]:
        """Without the samples."""
        return {"median_ms": self.median_ms, "p20_ms": self.p20_ms, "p80_ms": self.p80_ms}

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.p20_ms:.3g}-{self.p80_ms:.3g})"


def compare(
    functions: Mapping[str, Callable[[], object]], *, seconds: float = 3.0, rounds: int = 200
) -> dict[str, Timing]:
    """Time per call of each function, called in turn (A B A B ...) after a warm-up.

    Taking turns gives a change of the machine's clock or load to all of them alike. It ends after
    ``rounds``, or when ``seconds`` have passed and five rounds are done. On CUDA every sample waits
    for the device; Python's garbage collector is off meanwhile. Modes (eval, inference) are the
    caller's."""
    if not functions:
        raise ReportError("compare: expected at least one function, got none.")
    if not seconds > 0 or rounds < 1:
        raise ReportError(
            f"compare(seconds={seconds!r}, rounds={rounds!r}): expected seconds > 0, rounds >= 1."
        )
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        calls = {name: _warm_up(function) for name, function in functions.items()}
        samples: dict[str, list[float]] = {name: [] for name in functions}
        start, done = perf_counter(), 0
        while done < rounds and (done < FEWEST_ROUNDS or perf_counter() - start < seconds):
            for name, function in functions.items():
                samples[name].append(_sample_ms(function, calls[name]))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(tuple(values)) for name, values in samples.items()}


def paired_ratio(first: Timing, second: Timing) -> float:
    """Median over the rounds of ``first / second``: how many times faster the second one is.

    Both from one call of `compare`: a pair saw the same machine, unlike the two medians."""
    if not first.samples_ms or len(first.samples_ms) != len(second.samples_ms):
        raise ReportError(
            f"paired_ratio: {len(first.samples_ms)} and {len(second.samples_ms)} samples are no "
            "pairs. Give two timings of one call of compare."
        )
    pairs = zip(first.samples_ms, second.samples_ms, strict=True)
    return median(one / other for one, other in pairs)


def compare_models(
    models: Mapping[str, nn.Module],
    example: Mapping[str, Tensor],
    batch_size: int,
    *,
    seconds: float = 3.0,
    rounds: int = 200,
) -> dict[str, Timing]:
    """Time per batch of each model, in eval and inference mode and without the autocast that a
    Trainer leaves on it; their own modes come back after.

    example: name -> tensor (1 or batch_size, ...), moved to each model's device and, where it holds
    floats, to its dtype; one row is repeated."""
    rows = {
        name: value if value.shape[0] == batch_size else value.expand(batch_size, *value.shape[1:])
        for name, value in example.items()
    }
    runs: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack, _evaluating(models), torch.inference_mode():
        for name, model in models.items():
            stack.enter_context(own_forward(model))
            first = next(model.parameters())
            given = {
                key: value.to(first.device, first.dtype if value.is_floating_point() else None)
                for key, value in rows.items()
            }
            given = {key: value.contiguous() for key, value in given.items()}
            runs[name] = partial(_call, model, given)
            try:
                runs[name]()
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in given.items())
                raise ReportError(
                    f"the {name}, a {type(model).__name__}, cannot run on {sizes}: {error}. Pass "
                    "an example it takes as inputs={name: tensor}, or latency=False."
                ) from error
        return compare(runs, seconds=seconds, rounds=rounds)


def random_inputs(
    models: Mapping[str, nn.Module], sequence_length: int, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Ids that every model knows with a mask of ones, or pixels, by the ``main_input_name`` of the
    model, or of the one inside that takes what an `nn.Sequential` is given."""
    random = torch.Generator().manual_seed(seed)
    takers = {name: _taker(model) for name, model in models.items()}
    name, model = next(iter(takers.items()))
    wanted = getattr(model, "main_input_name", None)
    configs: list[Any] = [one.config for one in takers.values() if hasattr(one, "config")]
    if wanted == "input_ids" and all(hasattr(one, "vocab_size") for one in configs):
        known = [getattr(config, "max_position_embeddings", None) for config in configs]
        longest = min((length for length in known if length and length > 0), default=None)
        if longest is not None and sequence_length > longest:
            raise ReportError(
                f"sequence_length={sequence_length}: the models have {longest} positions. Pass "
                f"sequence_length={longest} or less."
            )
        entries = min(config.vocab_size for config in configs)
        drawn: dict[str, Any] = {"generator": random, "device": "cpu"}
        ids = torch.randint(entries, (batch_size, sequence_length), **drawn)
        masked = "attention_mask" in inspect.signature(model.forward).parameters
        return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
    config = getattr(model, "config", None)
    height = getattr(config, "image_size", None)
    if wanted == "pixel_values" and height is not None:
        size = tuple(height) if isinstance(height, list | tuple) else (height, height)
        channels = getattr(config, "num_channels", 3)
        pixels = torch.randn(batch_size, channels, *size, generator=random, device="cpu")
        return {"pixel_values": pixels}
    raise ReportError(
        f"the {name}, a {type(model).__name__}, takes {wanted or 'inputs of unknown names'}: only "
        "input_ids of a known vocabulary and pixel_values are made up here. Pass one example as "
        f"inputs={{{wanted or 'name'!r}: tensor (1, ...)}}, or latency=False."
    )


def environment(model: nn.Module) -> dict[str, str | int]:
    """Where and with what ``model`` is measured: machine, versions, date (UTC); nothing private."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    affinity = getattr(os, "sched_getaffinity", None)
    found: dict[str, str | int] = {
        "cpu": cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "kronbert": sys.modules[__package__].__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


@contextmanager
def _evaluating(models: Mapping[str, nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        for model in models.values():
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _taker(model: nn.Module) -> nn.Module:
    inside = model.modules() if isinstance(model, nn.Sequential) else iter([model])
    return next((module for module in inside if hasattr(module, "main_input_name")), model)


def _call(model: nn.Module, example: Mapping[str, Tensor]) -> object:
    """An `nn.Sequential`, as a SentenceTransformer is, takes one argument, and may add to it."""
    return model(dict(example)) if isinstance(model, nn.Sequential) else model(**example)


def _warm_up(function: Callable[[], object]) -> int:
    """Calls that make one sample long enough for the clock."""
    for _ in range(WARM_UP):
        function()
    once_ms = _sample_ms(function, 1)
    return max(1, ceil(SHORTEST_SAMPLE_MS / max(once_ms, 1e-3)))


def _sample_ms(function: Callable[[], object], calls: int) -> float:
    _synchronise()
    start = perf_counter()
    for _ in range(calls):
        function()
    _synchronise()
    return 1e3 * (perf_counter() - start) / calls


def _synchronise() -> None:
    # A process that never touched CUDA has nothing to wait for, and must not start it here.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
