"""`KroneckerLinear`: an `nn.Linear` whose weight is a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional
from .decompose import nearest_kronecker
from .shapes import Groups, KroneckerShape, check_groups


class KroneckerTerms(nn.Module):
    """Holds the matrices of a sum of groups: ``a``, ``b``, then ``a_1``, ``b_1``, ..."""

    groups: Groups

    def matrices(self, letter: str) -> list[Tensor]:
        """The parameters called ``letter`` ("a" or "b"), one per group."""
        return [
            getattr(self, letter if i == 0 else f"{letter}_{i}") for i in range(len(self.groups))
        ]

    def _new_matrices(self, sizes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], **to) -> None:
        for i, (a_size, b_size) in enumerate(sizes):
            end = "" if i == 0 else f"_{i}"
            self.register_parameter(f"a{end}", nn.Parameter(torch.empty(a_size, **to)))
            self.register_parameter(f"b{end}", nn.Parameter(torch.empty(b_size, **to)))

    @torch.no_grad()
    def _fill(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        for letter, values in (("a", a), ("b", b)):
            for parameter, value in zip(self.matrices(letter), values, strict=True):
                parameter.copy_(value)

    @property
    def shapes(self) -> str:
        return " + ".join(str(shape) for shape in self.groups)


class KroneckerLinear(KroneckerTerms):
    """`nn.Linear` with weight ``sum_r a[r] ⊗ b[r]`` (Tahaei et al. 2022).

    x (..., a_in * b_in) -> (..., a_out * b_out). groups: one shape, or several that are summed.
    Parameters: a (rank, a_out, a_in), b (rank, b_out, b_in), bias (out) or None; for a second group
    a_1, b_1. Initialised so that outputs keep the scale `nn.Linear`'s initialisation gives them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: KroneckerShape | Sequence[KroneckerShape],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.groups = (groups,) if isinstance(groups, KroneckerShape) else tuple(groups)
        check_groups(self.groups, out_features, in_features, "KroneckerLinear")
        self._new_matrices(
            [((s.rank, s.a_out, s.a_in), (s.rank, s.b_out, s.b_in)) for s in self.groups],
            device=device,
            dtype=dtype,
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Entries of the weight get variance 1 / (3 in), as `nn.Linear` gives them."""
        for shape, a, b in zip(self.groups, self.matrices("a"), self.matrices("b"), strict=True):
            variance = 1 / (3 * self.in_features * shape.rank * len(self.groups))
            a.normal_(std=variance**0.25)
            b.normal_(std=variance**0.25)
        if self.bias is not None:
            self.bias.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.kron_linear(x, self.matrices("a"), self.matrices("b"), self.bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, groups: KroneckerShape | Sequence[KroneckerShape]
    ) -> tuple[KroneckerLinear, float]:
        """The nearest layer of these shapes to ``linear``, and its relative weight error."""
        module = cls._like(linear, linear.out_features, linear.in_features, groups)
        return module, module._fit(linear.weight, linear.bias)

    @classmethod
    def from_conv1d(
        cls, conv: nn.Module, groups: KroneckerShape | Sequence[KroneckerShape]
    ) -> tuple[KroneckerLinear, float]:
        """The same for transformers' `Conv1D`, which stores its weight (in, out)."""
        inner, out = conv.weight.shape
        module = cls._like(conv, out, inner, groups)
        return module, module._fit(conv.weight.T, conv.bias)

    def to_linear(self) -> nn.Linear:
        """The dense twin: the same function, the weight multiplied out in float64."""
        a, b = self.matrices("a"), self.matrices("b")
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=a[0].device,
            dtype=a[0].dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(dense_weight(a, b))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        linear.weight.requires_grad_(a[0].requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.shapes}, bias={self.bias is not None}"

    @classmethod
    def _like(cls, dense: nn.Module, out: int, inner: int, groups) -> KroneckerLinear:
        return cls(
            inner,
            out,
            groups,
            bias=dense.bias is not None,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        ).train(dense.training)

    @torch.no_grad()
    def _fit(self, weight: Tensor, bias: Tensor | None) -> float:
        a, b, error = nearest_kronecker(weight.detach(), self.groups)
        self._fill(a, b)
        if bias is not None:
            self.bias.copy_(bias)
        return error


def dense_weight(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``sum a ⊗ b`` rounded once: multiplied out in float64."""
    return functional.rebuild_weight([t.detach().double() for t in a], [t.double() for t in b])
