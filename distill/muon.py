"""Muon for the matrices of Kronecker layers: steps that are as long in every direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronbert import KroneckerLinear

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon"), which five times brings
singular values into about [0.7, 1.2]."""

ITERATIONS = 5
RMS = 0.2
"""Root mean square of a step's entries at rate 1: about that of AdamW's (Liu et al. 2025, "Muon is
scalable for LLM training", section 2.2)."""


def muon_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The matrices a and b of all `KroneckerLinear` layers, frozen ones left out. Not of embedding
    tables: a batch reads few of their rows."""
    layers = [module for module in model.modules() if isinstance(module, KroneckerLinear)]
    found = {
        id(matrix): matrix
        for layer in layers
        for letter in "ab"
        for matrix in layer.matrices(letter)
        if matrix.requires_grad
    }
    return list(found.values())


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the parameter groups with ``muon=True``, AdamW for the others.

    params: parameter groups, as `torch.optim.AdamW` takes them. Matrices are stacks (rank, rows,
    columns). `torch.optim.Muon` takes single matrices only, and nothing else beside them."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "muon": False})
        self._adamw = torch.optim.AdamW([{"params": []}])
        for group in self.param_groups:
            for key, value in self._adamw.defaults.items():
                group.setdefault(key, value)
            wrong = [tuple(p.shape) for p in group["params"] if group["muon"] and p.dim() != 3]
            if wrong:
                raise ValueError(f"Muon: expected stacks (rank, rows, columns), got {wrong[0]}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both kinds."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group)
        # Loading a state makes new groups and a new state.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _move(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        gradient: Any = parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction(ahead), alpha=-group["lr"])


def direction(gradient: Tensor) -> Tensor:
    """A stack (rank, rows, columns) -> the step of rate 1 of its shape.

    Terms are matrices of their own; those with one row or column are the rows of one matrix, the
    (rank, n) factor of a truncated SVD. All singular values of a matrix become about one."""
    vectors = min(gradient.shape[1:]) == 1
    matrices = gradient.reshape(1, len(gradient), -1) if vectors else gradient
    longer = max(matrices.shape[1:])
    return (RMS * longer**0.5) * orthogonal(matrices).reshape(gradient.shape).to(gradient)


def orthogonal(matrices: Tensor) -> Tensor:
    """About U Vᵀ of every matrix U S Vᵀ of the stack (count, rows, columns), in float32; zero of a
    zero matrix."""
    x = matrices.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def with_muon(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> Muon:
    """`Muon` on ``optimizer``'s groups: `muon_parameters` in groups of their own, whose learning
    rate is ``rate`` times the group's. Before the scheduler is made, which keeps the ratio."""
    chosen = {id(parameter) for parameter in muon_parameters(model)}
    plain, moved = [], []
    for group in optimizer.param_groups:
        here = [p for p in group["params"] if id(p) in chosen]
        rest = [p for p in group["params"] if id(p) not in chosen]
        if rest:
            plain.append({**group, "params": rest})
        if here:
            moved.append({**group, "params": here, "lr": rate * group["lr"], "muon": True})
    return Muon([*plain, *moved])
