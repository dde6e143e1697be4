"""`KroneckerLinear`: an `nn.Linear` whose weight is a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import cpu, functional
from .decompose import nearest_kronecker
from .shapes import Groups, KroneckerShape, check_groups

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D
    from typing_extensions import Self


class KroneckerTerms(nn.Module):
    """Holds the matrices of a sum of groups: ``a``, ``b``, then ``a_1``, ``b_1``, ..."""

    groups: Groups

    def matrices(self, letter: str) -> list[nn.Parameter]:
        """The parameters called ``letter`` ("a" or "b"), one per group."""
        # nn.Module.__getattr__ costs more than the rest of the way.
        if len(self.groups) == 1 and (only := self._parameters.get(letter)) is not None:
            return [only]
        return [
            getattr(self, letter if i == 0 else f"{letter}_{i}") for i in range(len(self.groups))
        ]

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; what was kept of the matrices is made anew, see `kronbert.cpu`."""
        cpu.forget(self.parameters(recurse=False))
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        cpu.forget(self.parameters(recurse=False))  # .to() and the like write through param.data
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        cpu.forget(
            self.parameters(recurse=False)
        )  # a parameter with weak references is not swapped
        super()._load_from_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no weight of its own: it is multiplied out of a and b "
                "at every reading. Set these, or change the dense twin (kronbert.merge) and "
                "convert that."
            )
        super().__setattr__(name, value)

    @property
    def shapes(self) -> str:
        return " + ".join(str(shape) for shape in self.groups)

    def _new_matrices(
        self, sizes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], **to: Any
    ) -> None:
        for i, (a_size, b_size) in enumerate(sizes):
            end = "" if i == 0 else f"_{i}"
            self.register_parameter(f"a{end}", nn.Parameter(torch.empty(a_size, **to)))
            self.register_parameter(f"b{end}", nn.Parameter(torch.empty(b_size, **to)))

    @torch.no_grad()
    def _fill(self, a: Sequence[Tensor], b: Sequence[Tensor], like: Tensor) -> None:
        """Take these values; trainable where the dense weight ``like`` is."""
        for letter, values in (("a", a), ("b", b)):
            for parameter, value in zip(self.matrices(letter), values, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(like.requires_grad)


class KroneckerLinear(KroneckerTerms):
    """`nn.Linear` with weight ``sum_r a[r] ⊗ b[r]`` (Tahaei et al. 2022).

    x (..., a_in * b_in) -> (..., a_out * b_out). groups: one shape, or several that are summed.
    Parameters: a (rank, a_out, a_in), b (rank, b_out, b_in), bias (out) or None; for a second group
    a_1, b_1. Initialised so that outputs keep the scale `nn.Linear`'s initialisation gives them."""

    conv1d = False
    """Whether it stands for transformers' `Conv1D`, and `kronbert.merge` gives one back."""

    bias: nn.Parameter | None

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
        found = self._parameters
        bias = found["bias"] if "bias" in found else self.bias  # pruned, parametrised: no parameter
        return functional.kron_linear(x, self.matrices("a"), self.matrices("b"), bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), multiplied out at every reading, with gradients.

        For code that reads past the module, as `nn.TransformerEncoderLayer` does in eval mode; it
        costs the product that `forward` avoids."""
        return functional.rebuild_weight(self.matrices("a"), self.matrices("b"))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, groups: KroneckerShape | Sequence[KroneckerShape]
    ) -> tuple[KroneckerLinear, float]:
        """The nearest layer of these shapes to ``linear``, and its relative weight error."""
        return cls._nearest(linear.weight, linear, groups)

    @classmethod
    def from_conv1d(
        cls, conv: Conv1D, groups: KroneckerShape | Sequence[KroneckerShape]
    ) -> tuple[KroneckerLinear, float]:
        """The same for transformers' `Conv1D`, which stores its weight (in, out)."""
        module, error = cls._nearest(conv.weight.T, conv, groups)
        module.conv1d = True
        return module, error

    def to_linear(self) -> nn.Linear:
        """The dense twin: the same function, the weight multiplied out in float64."""
        a, b = self.matrices("a"), self.matrices("b")
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dense_weight(a, b).to(a[0].dtype), a[0].requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def to_conv1d(self) -> Conv1D:
        """The dense twin as transformers' `Conv1D`, which has a bias always."""
        from transformers.pytorch_utils import Conv1D

        linear = self.to_linear()
        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features)
        weight = linear.weight
        conv.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
        conv.bias = nn.Parameter(weight.new_zeros(self.out_features))
        if self.bias is not None:
            conv.bias = linear.bias
        return conv.train(self.training)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, {self.shapes}, bias={bias}"

    @classmethod
    def _nearest(
        cls,
        weight: Tensor,
        dense: nn.Linear | Conv1D,
        groups: KroneckerShape | Sequence[KroneckerShape],
    ) -> tuple[KroneckerLinear, float]:
        """weight (out, in): that of ``dense``, as `nn.Linear` stores it."""
        out, inner = weight.shape
        # Made on the meta device: the initial values would be thrown away, and take random numbers.
        module = cls(inner, out, groups, bias=False, device="meta", dtype=weight.dtype)
        module.to_empty(device=weight.device)
        a, b, error = nearest_kronecker(weight.detach(), module.groups)
        module._fill(a, b, weight)
        if dense.bias is not None:
            module.bias = nn.Parameter(dense.bias.detach().clone(), dense.bias.requires_grad)
        return module.train(dense.training), error


def dense_weight(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``sum a ⊗ b`` in float64, without gradients."""
    return functional.rebuild_weight(
        [one.detach().double() for one in a], [one.detach().double() for one in b]
    )
