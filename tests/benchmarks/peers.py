"""What a user would run instead of kronbert, each as one linear map y = x · (sum a ⊗ b)ᵀ + bias.

Every peer is given the same matrices, and its answer is held against `kronbert.reference` in
float64 before it is timed. One that is not installed, or cannot do a shape, says so in its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronbert import KroneckerLinear, reference
from kronbert.latency import Timing, compare, paired_ratio
from kronbert.presets import preset
from kronbert.shapes import KroneckerShape

OURS = "kronbert"

LAYERS = {"attention": (768, 768), "expand": (3072, 768), "contract": (768, 3072)}
"""BERT-base's matrices (out, in), by the presets' names for them."""

FAR_OFF = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}
"""Relative error (rms) above which an answer is wrong, not rounded."""

SLOW_MS = 250.0
"""A slower peer would hold up the others' rounds: it is timed beside kronbert alone."""

HOPELESS_MS = 2000.0
"""A slower one is timed once; pyfastkron on 384x384 ⊗ 2x2 or in bfloat16 can take seconds."""


class AbsentError(Exception):
    """Why a peer has no figure: it is not installed, or cannot do this."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """x (rows, in), a (rank, a_out, a_in), b (rank, b_out, b_in), bias (out), dy (rows, out).

    backward: whether forward and backward (to x and the peer's weights) are timed, or forward."""

    shape: KroneckerShape
    x: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor
    dy: Tensor
    backward: bool = False

    @classmethod
    def random(
        cls, shape: KroneckerShape, rows: int, dtype: torch.dtype, *, backward: bool = False
    ) -> Problem:
        """Entries such that x, the weight's rows and y have entries of about one."""
        random = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*size, generator=random)).to(dtype)

        scale = (shape.rank * shape.in_features) ** -0.25
        return cls(
            shape=shape,
            x=normal(rows, shape.in_features),
            a=normal(shape.rank, shape.a_out, shape.a_in, scale=scale),
            b=normal(shape.rank, shape.b_out, shape.b_in, scale=scale),
            bias=normal(shape.out_features),
            dy=normal(rows, shape.out_features),
            backward=backward,
        )


@dataclass(frozen=True)
class Layer:
    """A peer set up for a problem: forward, and the weights it would train."""

    forward: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]


def kronbert_linear(p: Problem) -> Layer:
    """The module as a model holds it: in evaluation mode its engine may keep what it derived from
    the matrices, as `nn.Linear` keeps its weight."""
    linear = KroneckerLinear(p.shape.in_features, p.shape.out_features, p.shape, dtype=p.x.dtype)
    weights = tuple(linear.parameters())
    linear.load_state_dict({"a": p.a, "b": p.b, "bias": p.bias})
    return Layer(linear.train(p.backward), weights)


def dense(p: Problem) -> Layer:
    """`nn.Linear` with the weight multiplied out once: what is replaced."""
    linear = nn.Linear(p.shape.in_features, p.shape.out_features, dtype=p.x.dtype)
    with torch.no_grad():
        linear.weight.copy_(reference.kron_weight(p.a.double(), p.b.double()))
        linear.bias.copy_(p.bias)
    return Layer(linear, (linear.weight, linear.bias))


def two_matmuls(p: Problem) -> Layer:
    """x (n, a_in, b_in) @ bᵀ, then a @ that, or a first: the faster order of the two, term by
    term. The way most code found in public writes a Kronecker layer."""
    a, b, bias = copies(p.a, p.b, p.bias)

    def forward(x: Tensor, order: str) -> Tensor:
        n = x.shape[0]
        blocks = x.view(n, p.shape.a_in, p.shape.b_in)
        y = None
        for one_a, one_b in zip(a, b, strict=True):
            first_b = order == "b"
            term = one_a @ (blocks @ one_b.T) if first_b else (one_a @ blocks) @ one_b.T
            y = term if y is None else y + term
        assert y is not None
        return y.reshape(n, p.shape.out_features) + bias

    orders = [Layer(partial(forward, order=order), (a, b, bias)) for order in ("a", "b")]
    return min(orders, key=lambda layer: best_ms(call(layer, p)))


def torch_kron(p: Problem) -> Layer:
    """`torch.kron`, then `F.linear`: the weight is rebuilt at every call."""
    a, b, bias = copies(p.a, p.b, p.bias)

    def forward(x: Tensor) -> Tensor:
        terms = [torch.kron(one_a, one_b) for one_a, one_b in zip(a, b, strict=True)]
        return F.linear(x, terms[0] if len(terms) == 1 else torch.stack(terms).sum(0), bias)

    return Layer(forward, (a, b, bias))


def einsum(p: Problem) -> Layer:
    """One `torch.einsum` of three operands; the order is torch's choice."""
    a, b, bias = copies(p.a, p.b, p.bias)

    def forward(x: Tensor) -> Tensor:
        blocks = x.view(x.shape[0], p.shape.a_in, p.shape.b_in)
        y = torch.einsum("nij,roi,rpj->nop", blocks, a, b)
        return y.reshape(x.shape[0], p.shape.out_features) + bias

    return Layer(forward, (a, b, bias))


def pyfastkron(p: Problem) -> Layer:
    """FastKron's ``gemkm``; it stores matrices (in, out), and refuses `nn.Parameter`."""
    fastkron = load("pyfastkron.fastkrontorch")
    a, b, bias = copies(p.a.mT, p.b.mT, p.bias)

    def forward(x: Tensor) -> Tensor:
        y = bias
        for one_a, one_b in zip(a, b, strict=True):
            y = fastkron.gemkm(x, [one_a, one_b]) + y
        return y

    return Layer(forward, (a, b, bias))


def block_tt(p: Problem) -> Layer:
    """tensorly-torch's Block Tensor-Train of two cores; its rank counts Kronecker terms."""
    tltorch = load("tltorch")
    s = p.shape
    layer = tltorch.FactorizedLinear(
        (s.a_in, s.b_in),
        (s.a_out, s.b_out),
        bias=True,
        factorization="blocktt",
        rank=[1, s.rank, 1],
        implementation="factorized",
        dtype=p.x.dtype,
    )
    with torch.no_grad():
        first, second = layer.weight.factors
        first.copy_(p.a.permute(1, 2, 0)[None])
        second.copy_(p.b[..., None])
        layer.bias.copy_(p.bias)
    return Layer(layer, (first, second, layer.bias))


def lokr(p: Problem) -> Layer:
    """PEFT's LoKr on a zero `nn.Linear`: its frozen dense base is part of it, as users run it."""
    if p.shape.rank > 1:
        raise AbsentError("one Kronecker term only")
    config = load("peft").LoKrConfig()
    base = nn.Linear(p.shape.in_features, p.shape.out_features, dtype=p.x.dtype)
    with torch.no_grad():
        base.weight.zero_()
        base.bias.copy_(p.bias)
    large = max(p.shape.in_features, p.shape.out_features)  # as rank: both matrices stay whole
    adapted = load("peft.tuners.lokr.layer").Linear(base, "default", config, r=large, alpha=large)
    # PEFT chooses its own sizes for the two matrices; ours take their place.
    adapted.lokr_w1["default"], adapted.lokr_w2["default"] = map(
        nn.Parameter, copies(p.a[0], p.b[0])
    )
    base.requires_grad_(False)
    return Layer(adapted, (adapted.lokr_w1["default"], adapted.lokr_w2["default"]))


PEERS: dict[str, Callable[[Problem], Layer]] = {
    OURS: kronbert_linear,
    "nn.Linear": dense,
    "two matmuls": two_matmuls,
    "torch.kron": torch_kron,
    "einsum": einsum,
    "pyfastkron": pyfastkron,
    "tensorly-torch BlockTT": block_tt,
    "PEFT LoKr": lokr,
}


def layer_shape(name: str, layer: str) -> KroneckerShape:
    """The shape of BERT-base's ``layer``, a key of `LAYERS`, in the preset called ``name``."""
    return getattr(preset(name), layer).shape(*LAYERS[layer], f"{name}.{layer}")


def ready(
    p: Problem, only: tuple[str, ...] = tuple(PEERS)
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Calls to time, of peers whose answers are right, and why the others have none."""
    calls: dict[str, Callable[[], object]] = {}
    absent: dict[str, str] = {}
    for name in only:
        try:
            layer = PEERS[name](p)
            check(name, layer, p)
        except AbsentError as error:
            absent[name] = str(error)
            continue
        calls[name] = call(layer, p)
    return calls, absent


def check(name: str, layer: Layer, p: Problem) -> None:
    """Raise ArithmeticError unless y and the gradient of x are right to within rounding."""
    weight = reference.kron_weight(p.a.double(), p.b.double())
    exact = {
        "y": p.x.double() @ weight.T + p.bias.double(),
        "the gradient of x": p.dy.double() @ weight,
    }
    x = p.x.detach().requires_grad_()
    y = layer.forward(x)
    (dx,) = torch.autograd.grad(y, x, p.dy)
    for label, got in (("y", y.detach()), ("the gradient of x", dx)):
        off = float((got.double() - exact[label]).norm() / exact[label].norm())
        if not off <= FAR_OFF[p.x.dtype]:
            raise ArithmeticError(
                f"{name}: {label} of {p.shape} is off by {off:.1e} in {p.x.dtype}: expected at "
                f"most {FAR_OFF[p.x.dtype]:.0e}. A wrong answer is not timed."
            )


def call(layer: Layer, p: Problem) -> Callable[[], object]:
    """What is timed: forward and backward, or forward in inference mode."""
    return partial(both, layer, p) if p.backward else partial(forward_only, layer, p)


def forward_only(layer: Layer, p: Problem) -> Tensor:
    with torch.inference_mode():
        return layer.forward(p.x)


def both(layer: Layer, p: Problem) -> tuple[Tensor, ...]:
    x = p.x.detach().requires_grad_()
    weights = [weight.requires_grad_() for weight in layer.weights]
    return torch.autograd.grad(layer.forward(x), [x, *weights], p.dy)


def timed(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 1.0
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time of each call, and how many times faster `OURS` is than each other one.

    Fast ones take turns in one `compare`; a slow one takes turns with ours alone."""
    once = {name: best_ms(function, calls=1) for name, function in calls.items()}
    together = {name: calls[name] for name in calls if once[name] < SLOW_MS or name == OURS}
    timings = compare(together, seconds=seconds * len(together))
    ratios = {name: paired_ratio(timings[name], timings[OURS]) for name in together}
    for name in calls.keys() - together.keys():
        if once[name] < HOPELESS_MS:
            pair = compare({OURS: calls[OURS], name: calls[name]}, rounds=3)
            timings[name], ratios[name] = pair[name], paired_ratio(pair[name], pair[OURS])
        else:
            timings[name] = Timing.of((once[name],))
            ratios[name] = once[name] / timings[OURS].median_ms
    del ratios[OURS]
    return timings, ratios


def best_ms(function: Callable[[], object], calls: int = 5) -> float:
    """The shortest of a few calls, the first of which, a warm-up, counts only when it is alone or
    already slow."""
    found = []
    for _ in range(calls + 1):
        start = perf_counter()
        function()
        found.append(1e3 * (perf_counter() - start))
        if found[0] > HOPELESS_MS:
            return found[0]
    return min(found[1:])


def copies(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous leaves of their own: a peer's gradients are none of another's business."""
    return tuple(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors)


def load(module: str) -> Any:
    """The peer's module; `AbsentError` where it is not installed."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise AbsentError("not installed") from error
    return importlib.import_module(module)
