"""Row kernels in C for what lies between two products on a CPU, built where they run.

PyTorch makes a bias, a GELU, a small matrix over slices or a LayerNorm one pass over memory each,
and a batched product with a side of 2 much slower than that. `native.c` makes them one. The first
use in a cache folder builds it with the machine's C compiler, as torch.compile and Triton build
theirs; later processes load that file. `library` is None, and plain PyTorch runs, where there is no
compiler, off Linux, and beside another OpenMP than GNU's. What the environment says, when the first
product runs:

    KRONBERT_NATIVE=0     no kernels: nothing is built or loaded
    CC                    the compiler, a name or a path; default: cc
    KRONBERT_CACHE        the folder for ``native-*.so``; default: ~/.cache/kronbert, or under
                          XDG_CACHE_HOME. Each processor, compiler name and version of the source
                          has its own file; any may be deleted

A compiler that fails, and a folder that cannot be written, are warned of, once a process.

The functions check nothing: `kronbert.cpu_blocks` and `kronbert.forms` see to sizes and dtypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError

LANES = 16
"""Widths must be multiples of it: what the widest registers hold."""

SLICES = 16
"""Slices of a row that `mix` takes at most: they stay in registers."""

FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
"""No -ffast-math: gcc would have the library change how the whole process rounds tiny numbers."""

WIDE = ("-mprefer-vector-width=512",)
"""Registers of 512 bits where the processor has them: gcc takes 256 on its own."""

DTYPES = (torch.float32, torch.bfloat16)

_SOURCES = ("native.c", "native_attention.c")
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "kronbert_mix": [_POINTER] * 4 + [_LONG] + [_INT] * 5,
    "kronbert_gather": [_POINTER] * 3 + [_LONG] + [_INT] * 5,
    "kronbert_spread": [_POINTER] * 3 + [_LONG] + [_INT] * 4,
    "kronbert_ffn_middle": [_POINTER] * 5 + [_LONG] + [_INT] * 6,
    "kronbert_bias_gelu": [_POINTER] * 2 + [_LONG] + [_INT] * 3,
    "kronbert_gelu_slope": [_POINTER] * 2 + [_LONG] + [_INT] * 2,
    "kronbert_add_norm": [_POINTER] * 5 + [_FLOAT, _POINTER, _LONG] + [_INT] * 3,
    "kronbert_attention": [_POINTER] * 8 + [_LONG] + [_INT] * 4 + [_FLOAT, _INT, _INT],
    "kronbert_attention_backward": [_POINTER] * 8 + [_LONG] + [_INT] * 4 + [_FLOAT, _INT],
}


@cache
def library() -> ctypes.CDLL | None:
    """The built functions; None where there are none. A build that fails is warned of, once."""
    if sys.platform != "linux" or os.environ.get("KRONBERT_NATIVE", "1") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not _shares_openmp():
        return None
    try:
        built = ctypes.CDLL(str(_build(compiler)))
    except (OSError, CheckpointError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"kronbert: {compiler} could not build the CPU row kernels, so plain PyTorch runs "
            f"instead, slower: {said}. KRONBERT_CACHE names the folder they are kept in; "
            "KRONBERT_NATIVE=0 turns them off.",
            stacklevel=2,
        )
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(built, name)
        function.argtypes = arguments
        function.restype = _INT if name.startswith("kronbert_attention") else None
    return built


def source() -> str:
    """Tells versions of the C code apart."""
    here, key = Path(__file__).parent, hashlib.sha256()
    for name in _SOURCES:
        key.update((here / name).read_bytes())
    return key.hexdigest()[:16]


def mix(z: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``matrix · z + bias`` on every row: z (n, q, w), matrix (p, q) float32 -> (n, p * w)."""
    n, q, w = z.shape
    p = matrix.shape[0]
    y = z.new_empty(n, p * w) if out is None else out
    _call("kronbert_mix", _at(z), _at(matrix), _at(bias), _at(y), n, p, q, w, *_how(z))
    return y


def gather(x: Tensor, b: Tensor, rows: int) -> Tensor:
    """``b · xᵀ`` of every row: x (n, rows * inner), b (m, inner) float32 -> (n, m, rows).

    inner: 2, 4, 8 or 16; rows a multiple of 16."""
    n, (m, inner) = x.shape[0], b.shape
    z = x.new_empty(n, m, rows)
    _call("kronbert_gather", _at(x), _at(b), _at(z), n, rows, inner, m, *_how(x))
    return z


def spread(z: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``zᵀ + bias`` of every row: z (n, m, rows), bias (rows * m) -> (n, rows * m).

    m: 2, 4, 8 or 16; rows a multiple of 16."""
    n, m, rows = z.shape
    y = z.new_empty(n, rows * m) if out is None else out
    _call("kronbert_spread", _at(z), _at(bias), _at(y), n, rows, m, *_how(z))
    return y


def ffn_middle(z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor) -> Tensor:
    """``down · gelu(up · z + bias)``: z (n, k, w), up (wide, k), bias (wide * w), down (m, wide);
    up and down float32 -> (n, m, w). The wide rows are never in memory."""
    n, k, w = z.shape
    wide, m = up.shape[0], down.shape[0]
    y = z.new_empty(n, m, w)
    at = _at(z), _at(up), _at(bias), _at(down), _at(y)
    _call("kronbert_ffn_middle", *at, n, k, wide, m, w, *_how(z))
    return y


def bias_gelu_(x: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x + bias)`` in place: x (n, w), bias (w)."""
    n, w = x.shape
    _call("kronbert_bias_gelu", _at(x), _at(bias), n, w, *_how(x))
    return x


def gelu_slope_(x: Tensor, slope: Tensor) -> None:
    """``x = gelu(x)`` and ``slope = slope * gelu'(x)`` in place: both (n, w) float32."""
    n, w = x.shape
    _call("kronbert_gelu_slope", _at(x), _at(slope), n, w, torch.get_num_threads())


def add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """``LN(x + bias + residual)``: x, residual (..., w), the others (w)."""
    y = torch.empty_like(x)
    w = x.shape[-1]
    at = _at(x), _at(bias), _at(residual), _at(weight), _at(shift)
    _call("kronbert_add_norm", *at, eps, _at(y), x.numel() // w, w, *_how(x))
    return y


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    """``softmax(scale q kᵀ + mask) v``, heads side by side: (batch, tokens, heads * d).

    biases: of query, key and value, added to them. mask (batch, 1 or tokens, padded) float32, -inf
    for a key that is not seen; padded: tokens to the next multiple of 16. A query that sees no key
    gets 0."""
    batch, tokens, width = query.shape
    y = torch.empty_like(query)
    at = _at(query), _at(key), _at(value), *map(_at, biases), _at(mask), _at(y)
    queries = 1 if mask is None else mask.shape[1]
    sizes = batch, heads, tokens, width // heads, queries
    if _call("kronbert_attention", *at, *sizes, scale, *_how(query)):
        raise MemoryError(f"attention of {tokens} tokens: no memory for one head's keys.")
    return y


def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    slope: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of `attention` without biases, from that of what it gives,
    slope: all float32."""
    batch, tokens, width = query.shape
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    at = map(_at, (query, key, value, mask, slope, *found))
    queries = 1 if mask is None else mask.shape[1]
    sizes = batch, heads, tokens, width // heads, queries
    threads = torch.get_num_threads()
    if _call("kronbert_attention_backward", *at, *sizes, scale, threads):
        raise MemoryError(f"attention of {tokens} tokens: no memory for one head's keys.")
    return found


def _call(name: str, *arguments: object) -> int | None:
    built = library()
    assert built is not None  # whoever asks has looked
    found: int | None = getattr(built, name)(*arguments)
    return found


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _how(x: Tensor) -> tuple[int, int]:
    """The last arguments: bf16 and threads."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _shares_openmp() -> bool:
    """Whether torch runs on GNU's OpenMP under the name the library will ask for: a second pool of
    threads would fight with torch's own. Some of its wheels carry another, or under another name;
    what other packages brought along (scikit-learn's) does not count."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    paths = [line[line.index("/") :] for line in lines if "/" in line]
    names = [path.rpartition("/")[2] for path in paths if "/torch/" in path]
    others = any(name.startswith(("libiomp", "libomp", "libgomp-")) for name in names)
    return any(path.endswith("/libgomp.so.1") for path in paths) and not others


def _build(compiler: str) -> Path:
    """The library's file, made if the cache has none of these sources, flags and processor."""
    from .cpu_calibrate import cache_folder, machine

    here, of = Path(__file__).parent, machine()
    parts = compiler, FLAGS, WIDE, of["cpu"], of["instructions"], source()
    key = hashlib.sha256(repr(parts).encode())
    path = cache_folder() / f"native-{key.hexdigest()[:16]}.so"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made, flags = Path(scratch, path.name), list(FLAGS)
        if "AVX512" in torch.backends.cpu.get_cpu_capability():
            flags += WIDE
        command = [compiler, *flags, "-shared", str(here / _SOURCES[-1]), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        with made.open("rb") as written:  # whole on the disk, or not there after a power cut
            os.fsync(written.fileno())
        made.replace(path)
    return path
