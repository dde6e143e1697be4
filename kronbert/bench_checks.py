"""The ops that kernels run, each beside its definition: is it right, and what must it cost?

`check` weighs an op's rounding against eager's in the same dtype; both are held against the
definition in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import blocks, functional, reference
from .presets import preset
from .shapes import Groups, KroneckerShape, low_rank, parse_groups

Tensors = dict[str, Tensor]

MAY_BE = 2.0
"""Times eager's error that an op's error may be."""

FLOOR = {torch.float32: 4.0, torch.float16: 0.25, torch.bfloat16: 0.25}
"""Machine epsilons of error that are no fault: in fp32, where eager often rounds just once, another
order of summation shows; in half precision both sum in fp32."""

FEW = 256
"""Below so many numbers a tensor's own error is a matter of luck (K8's b has four): eager's error
is then that of all tensors of the op, if it is larger."""

FAST_GELU = {"output": 1e-3, "d": 5e-3}
"""What ``gelu="fast"`` may be off erf by, relative: its values, and its slope in gradients."""

EPS = 1e-12


class Definition:
    """Linear maps and lookups as `kronbert.reference` defines them, in the tensors' dtype."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def linear(self, x: Tensor, name: str) -> Tensor:
        a, b, bias = linear_of(self.tensors, name)
        return reference.kron_linear(x, a, b, bias)

    def lookup(self, ids: Tensor, name: str) -> Tensor:
        a, b, _ = linear_of(self.tensors, name)
        return reference.kron_embedding(ids, [one.transpose(0, 1) for one in a], b)


class Dense(Definition):
    """The same with every weight multiplied out beforehand: what a dense model runs."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.weights: Tensors = {}
        for name in {key.partition(".")[0] for key in tensors if key.endswith(".a0")}:
            a, b, _ = linear_of(tensors, name)
            if name == "word":
                a = [one.transpose(0, 1) for one in a]
            weight = functional.rebuild_weight([one.detach() for one in a], b)
            self.weights[name] = weight.detach().contiguous().requires_grad_()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name], self.tensors.get(f"{name}.bias"))

    def lookup(self, ids: Tensor, name: str) -> Tensor:
        return F.embedding(ids, self.weights[name])


@dataclass(frozen=True, kw_only=True)
class Op:
    """A fused form and its definition; floats by name, every one of which gets a gradient.

    flops: in the cheaper order; moved: numbers read and written at least, each once."""

    name: str
    tensors: Tensors
    fused: Callable[[Tensors], Tensor | tuple[Tensor, ...]]
    plain: Callable[[Tensors, Definition], Tensor | tuple[Tensor, ...]]
    flops: int
    moved: int
    fast_gelu: bool = False
    ids: Tensor | None = field(default=None, repr=False)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Tensors:
        """Leaves with gradients: a rounded copy of the tensors."""
        return {
            name: tensor.to(device, dtype).requires_grad_() for name, tensor in self.tensors.items()
        }


def linear_of(tensors: Tensors, name: str) -> blocks.Linear:
    count = sum(key.startswith(f"{name}.a") for key in tensors)
    a = [tensors[f"{name}.a{i}"] for i in range(count)]
    b = [tensors[f"{name}.b{i}"] for i in range(count)]
    return blocks.Linear(a, b, tensors.get(f"{name}.bias"))


def norm_of(tensors: Tensors) -> blocks.Norm:
    return blocks.Norm(tensors["norm.weight"], tensors["norm.bias"], EPS)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(op: Op, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Errors (rms, relative) of the op and of eager in ``dtype``, of every output and gradient.

    worst: the largest ratio of the two; passed: whether every one is at most `MAY_BE`."""
    given = op.to(device, dtype)
    exact = _with_gradients(op, {name: t.detach().double() for name, t in given.items()}, None)
    eager = _with_gradients(op, given, None)
    ours = _with_gradients(op, given, op.fused)
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    ours_off, eager_off = (
        {name: _relative(one[name], right) for name, right in exact.items()}
        for one in (ours, eager)
    )
    usual_of_few = (sum(off**2 for off in eager_off.values()) / len(eager_off)) ** 0.5
    errors, worst, place = {}, 0.0, ""
    for name, right in exact.items():
        off, usual = ours_off[name], eager_off[name]
        errors[name] = [float(f"{off:.3g}"), float(f"{usual:.3g}")]
        allowed = max(usual, floor, usual_of_few if right.numel() < FEW else 0.0)
        fast = FAST_GELU[name.split()[0]] if op.fast_gelu else 0.0
        ratio = off / (allowed + fast)
        if not ratio <= worst:  # a NaN, too, is the worst
            worst, place = ratio, name
    passed = bool(worst <= MAY_BE)
    return {"passed": passed, "worst": float(f"{worst:.3g}"), "where": place, "errors": errors}


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm()) / max(float(exact.norm()), 1e-30)


def _with_gradients(
    op: Op, tensors: Tensors, fused: Callable[[Tensors], Any] | None
) -> dict[str, Tensor]:
    """Every output and gradient by name; of the definition when ``fused`` is None."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    got = outputs(fused(leaves) if fused else op.plain(leaves, Definition(leaves)))
    seeds = []
    for i, one in enumerate(got):
        random = torch.Generator().manual_seed(i)
        seed = torch.randn(one.shape, generator=random, dtype=torch.float64)
        # Rounded as the op under test sees it, in every dtype alike.
        seeds.append(seed.bfloat16().to(one.device, one.dtype))
    gradients = torch.autograd.grad(got, list(leaves.values()), seeds)
    found = {f"output {i}" if i else "output": one.detach() for i, one in enumerate(got)}
    return found | {f"d {name}": one for name, one in zip(leaves, gradients, strict=True)}


def make(
    name: str,
    maps: Mapping[str, Groups],
    rows: int,
    *,
    seed: int = 0,
    entries: int = 0,
    **words: Any,
) -> Op:
    """The op called ``name`` (a key of `KINDS`) with these linear maps, on random numbers.

    entries: of the word table for "embed_norm", beside 64 positions and 2 types; words: passed on,
    gelu="fast"."""
    random = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=random)

    first = next(iter(maps.values()))[0]
    last = list(maps.values())[-1][0]
    tensors: Tensors = {}
    ids = None
    width = last.in_features if name == "embed_norm" else last.out_features
    if name == "embed_norm":
        ids = torch.randint(entries, (rows,), generator=random)
        tensors["position"], tensors["kind"] = normal(64, width), normal(2, width)
    else:
        tensors["x"] = normal(rows, first.in_features)
    for map_name, groups in maps.items():
        for i, shape in enumerate(groups):
            scale = (shape.rank * shape.in_features * len(groups)) ** -0.25
            a = (shape.rank, shape.a_out, shape.a_in)
            if name == "embed_norm":
                a, scale = (shape.a_out, shape.rank, shape.a_in), shape.rank**-0.25
            tensors[f"{map_name}.a{i}"] = normal(*a, scale=scale)
            tensors[f"{map_name}.b{i}"] = normal(shape.rank, shape.b_out, shape.b_in, scale=scale)
        if name != "embed_norm":
            tensors[f"{map_name}.bias"] = normal(groups[0].out_features)
    if name.endswith("norm"):
        tensors["norm.weight"], tensors["norm.bias"] = 1 + normal(width, scale=0.1), normal(width)
    if name in ("linear_norm", "residual_norm", "add_norm"):
        tensors["residual"] = normal(rows, width)
    fused, plain = KINDS[name]
    fused = partial(fused, **words)
    if ids is not None:
        fused, plain = partial(fused, ids=ids), partial(plain, ids=ids)
    tokens = sum(shape.flops() for groups in maps.values() for shape in groups)
    written = rows * width * {"qkv": len(maps), "add_norm": 2}.get(name, 1)
    read = sum(t.numel() for key, t in tensors.items() if key != "word.a0")
    if name == "embed_norm":
        tokens, read = 2 * width * first.rank, read + rows * first.rank * first.a_in
    return Op(
        name=name,
        tensors=tensors,
        fused=fused,
        plain=plain,
        flops=rows * tokens,
        moved=written + read,
        fast_gelu=words.get("gelu") == "fast",
        ids=ids,
    )


def _qkv(t: Tensors, linear: Callable[[Tensor, str], Tensor]) -> tuple[Tensor, ...]:
    return tuple(linear(t["x"], name) for name in ("query", "key", "value"))


def _ffn(t: Tensors, d: Definition) -> Tensor:
    return d.linear(F.gelu(d.linear(t["x"], "expand")), "contract")


def _gated(t: Tensors, d: Definition) -> Tensor:
    u, g = d.linear(t["x"], "expand").chunk(2, -1)
    return d.linear(F.gelu(u) * g, "contract")


def _add_norm(t: Tensors, d: Definition) -> tuple[Tensor, Tensor]:
    total = t["residual"] + d.linear(t["x"], "map")
    return total, _norm(t, total)


def _norm(t: Tensors, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t["norm.weight"], t["norm.bias"], EPS)


def _positions(t: Tensors, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Position and type of each token, made up from where it stands."""
    places = torch.arange(ids.shape[0], device=t["position"].device)
    return places % 64, places % 2


def _embed(t: Tensors, *, ids: Tensor) -> Tensor:
    at, kind = _positions(t, ids)
    ids = ids.to(at.device)
    a, b, _ = linear_of(t, "word")
    return blocks.embed_norm(
        ids, a, b, norm_of(t),
        position=blocks.Lookup(at, t["position"]), kind=blocks.Lookup(kind, t["kind"]),
    )  # fmt: skip


def _embed_plain(t: Tensors, d: Definition, *, ids: Tensor) -> Tensor:
    at, kind = _positions(t, ids)
    x = d.lookup(ids.to(at.device), "word") + t["kind"][kind] + t["position"][at]
    return _norm(t, x)


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "kron_linear": (
        lambda t: functional.kron_linear(t["x"], *linear_of(t, "map")),
        lambda t, d: d.linear(t["x"], "map"),
    ),
    "qkv": (
        lambda t: blocks.qkv(t["x"], *(linear_of(t, name) for name in ("query", "key", "value"))),
        lambda t, d: _qkv(t, d.linear),
    ),
    "residual_norm": (
        lambda t: blocks.residual_norm(
            functional.kron_linear(t["x"], *linear_of(t, "map")), t["residual"], norm_of(t)
        ),
        lambda t, d: _norm(t, t["residual"] + d.linear(t["x"], "map")),
    ),
    "add_norm": (
        lambda t: blocks.add_norm(
            functional.kron_linear(t["x"], *linear_of(t, "map")), t["residual"], norm_of(t)
        ),
        _add_norm,
    ),
    "linear_norm": (
        lambda t: blocks.linear_norm(t["x"], linear_of(t, "map"), t["residual"], norm_of(t)),
        lambda t, d: _norm(t, t["residual"] + d.linear(t["x"], "map")),
    ),
    "ffn": (
        lambda t, gelu="exact": blocks.ffn(
            t["x"], linear_of(t, "expand"), linear_of(t, "contract"), gelu=gelu
        ),
        _ffn,
    ),
    "gated_ffn": (
        lambda t, gelu="exact": blocks.gated_ffn(
            t["x"], linear_of(t, "expand"), linear_of(t, "contract"), gelu=gelu
        ),
        _gated,
    ),
    "ffn_norm": (
        lambda t, gelu="exact": blocks.ffn_norm(
            t["x"], linear_of(t, "expand"), linear_of(t, "contract"), norm_of(t), gelu=gelu
        ),
        lambda t, d: _norm(t, t["x"] + _ffn(t, d)),
    ),
    "embed_norm": (_embed, _embed_plain),
}


def block_ops(name: str, rows: int, *, width: int = 768, entries: int = 1024) -> Iterator[Op]:
    """The fused forms of one encoder layer in the preset called ``name``, and the embedding."""
    chosen, where = preset(name), f"preset {name}"
    one = (chosen.attention.shape(width, width, where),)
    wide = (chosen.expand.shape(4 * width, width, where),)
    narrow = (chosen.contract.shape(width, 4 * width, where),)
    table = (chosen.embedding.shape(entries, width, where),)
    yield make("qkv", {"query": one, "key": one, "value": one}, rows)
    yield make("linear_norm", {"map": one}, rows)
    for gelu in ("exact", "fast"):
        yield make("ffn", {"expand": wide, "contract": narrow}, rows, gelu=gelu)
        yield make("ffn_norm", {"expand": wide, "contract": narrow}, rows, gelu=gelu)
    yield make("embed_norm", {"word": table}, rows, entries=entries)


def linear_maps(width: int = 768) -> dict[str, Groups]:
    """Shapes for `kron_linear`: the papers', balanced, low rank, odd, summed, mixed."""
    found: dict[str, Groups] = {}
    for name in ("k5", "k8", "k21"):
        chosen = preset(name)
        for layer, out, inner in (
            ("attention", width, width),
            ("expand", 4 * width, width),
            ("contract", width, 4 * width),
        ):
            found[f"{name} {layer}"] = (getattr(chosen, layer).shape(out, inner, name),)
    side = width // 16
    balanced = KroneckerShape(side, side, 16, 16)
    found |= {
        "balanced": (balanced,),
        "low rank": (low_rank(width, width, 24),),
        "mixed": (balanced, low_rank(width, width, 24)),
        "odd": parse_groups("30x20*7x3"),
        "odd, summed": parse_groups("3:21x5*3x7"),
        "odd, wide": parse_groups("2:5x7*65x33"),
    }
    return found


def gated_maps(width: int = 768) -> dict[str, dict[str, Groups]]:
    """Shapes for `blocks.gated_ffn`, whose first map gives what is activated and its gate."""
    k8 = preset("k8")
    expand, contract = (4 * width, width), (width, 2 * width)
    return {
        "low rank": {
            "expand": (low_rank(*expand, 24),),
            "contract": (low_rank(*contract, 24),),
        },
        "k8": {
            "expand": (k8.expand.shape(*expand, "preset k8"),),
            "contract": (k8.contract.shape(*contract, "preset k8"),),
        },
    }


def all_checks(
    rows: Sequence[int] = (1, 17, 300), *, width: int = 768, entries: int = 1024
) -> Iterator[tuple[str, Op]]:
    """Every op to check, with a name that says what it is."""
    for n in rows:
        for label, groups in linear_maps(width).items():
            yield f"kron_linear {label} {n} rows", make("kron_linear", {"map": groups}, n)
        odd = {"map": parse_groups("30x20*7x3")}
        for kind in ("residual_norm", "add_norm"):
            yield f"{kind} odd {n} rows", make(kind, odd, n)
        for label, maps in gated_maps(width).items():
            for gelu in ("exact", "fast"):
                op = make("gated_ffn", maps, n, gelu=gelu)
                yield f"gated_ffn {label} {n} rows" + ", gelu fast" * op.fast_gelu, op
        for name in ("k8", "k21"):
            for op in block_ops(name, n, width=width, entries=entries):
                gelu = ", gelu fast" if op.fast_gelu else ""
                yield f"{op.name} {name} {n} rows{gelu}", op
