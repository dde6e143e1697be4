"""The launches that a call would make of Triton's kernels, recorded and not run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

POINTERS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "bool": "u1",
}


class Allowance(NamedTuple):
    """Bytes of spills a case may have, float32 launches only, and why."""

    spill_bytes: int
    reason: str


@dataclass
class Launch:
    """One kernel with everything that decides its machine code."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]
    options: dict[str, int]
    cases: list[str] = field(default_factory=list)
    allowance: Allowance | None = None

    @property
    def key(self) -> str:
        """Equal for equal machine code on one architecture; holds the kernel's source, callees and
        the versions of Triton and its assembler."""
        import triton

        parts = (
            triton.__version__,
            self.kernel.cache_key,
            sorted(self.signature.items()),
            sorted((name, repr(value)) for name, value in self.constants.items()),
            self.divisible,
            sorted(self.options.items()),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def case(self) -> str:
        """The first case it comes from, and how many others there are."""
        others = len(self.cases) - 1
        return self.cases[0] + (f" and {others} more" if others else "")

    @property
    def dtypes(self) -> set[str]:
        """Float dtypes behind its pointers."""
        found = {kind.removeprefix("*") for kind in self.signature.values() if kind[0] == "*"}
        return {kind for kind in found if kind.startswith(("bf", "fp"))}


def specialise(param: Any, value: Any) -> tuple[str, bool]:
    """(type, divisible by 16) of a launch's argument, as Triton's own binder decides them."""
    import torch

    if param.is_constexpr or value is None:
        return "constexpr", False
    specialised = not param.do_not_specialize
    aligned = specialised and not param.do_not_specialize_on_alignment
    if isinstance(value, torch.Tensor):
        kind = POINTERS[str(value.dtype).removeprefix("torch.")]
        offset = value.storage_offset() * value.element_size()  # allocations start aligned
        return f"*{kind}", aligned and offset % 16 == 0
    if isinstance(value, bool):
        return param.annotation_type or "u1", False
    if isinstance(value, int):
        if value == 1 and specialised:
            return "constexpr", False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return param.annotation_type or kind, aligned and value % 16 == 0
    if isinstance(value, float):
        return param.annotation_type or "fp32", False
    raise TypeError(
        f"{param.name}={value!r}: a {type(value).__name__} is no argument this harness knows. "
        "Pass tensors and numbers, and anything else as tl.constexpr."
    )


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches ``call`` makes, in order."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def recorder(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = {param.name for param in self.params}
        options = {name: value for name, value in kwargs.items() if name not in names}
        bound = self.signature.bind(
            *args, **{name: value for name, value in kwargs.items() if name in names}
        )
        bound.apply_defaults()
        sizes = grid(bound.arguments) if callable(grid) else grid
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"{self.__name__}: grid {sizes}: expected whole numbers >= 1.")
        kinds = [specialise(param, bound.arguments[param.name]) for param in self.params]
        launch = Launch(self, {}, {}, (), options)
        for param, (kind, _) in zip(self.params, kinds, strict=True):
            launch.signature[param.name] = kind
            if kind == "constexpr":
                launch.constants[param.name] = bound.arguments[param.name]
        launch.divisible = tuple(i for i, (_, divisible) in enumerate(kinds) if divisible)
        found.append(launch)

    original = JITFunction.run
    JITFunction.run = recorder
    try:
        call()
    finally:
        JITFunction.run = original
    return found
