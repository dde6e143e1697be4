"""Muon for the matrices of Kronecker layers: steps that are as long in every direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
                self._move(group)
        # Loading a state makes new groups and a new state.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _move(self, group: Mapping[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
        gradients: Any = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, directions(ahead), alpha=-group["lr"])


def directions(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Stacks (rank, rows, columns) -> the steps of rate 1 of their shapes.

    Terms are matrices of their own; those with one row or column are the rows of one matrix, the
    (rank, n) factor of a truncated SVD. All singular values of a matrix become about one."""
    steps = orthogonal([_matrices(gradient) for gradient in gradients])
    return [
        (RMS * max(step.shape[1:]) ** 0.5 * step).reshape(gradient.shape).to(gradient)
        for step, gradient in zip(steps, gradients, strict=True)
    ]


def _matrices(gradient: Tensor) -> Tensor:
    vectors = min(gradient.shape[1:]) == 1
    return gradient.reshape(1, len(gradient), -1) if vectors else gradient


def orthogonal(stacks: Sequence[Tensor]) -> list[Tensor]:
    """About U Vᵀ of every matrix U S Vᵀ of the stacks (count, rows, columns), in float32; zero of a
    zero matrix.

    The iteration multiplies X by polynomials of X Xᵀ, which commute, so it runs on that alone, on
    the shorter side, for all matrices of one such side together; X is multiplied once."""
    wide = [x.mT if x.shape[1] > x.shape[2] else x for x in (one.float() for one in stacks)]
    squares = [x @ x.mT for x in wide]
    sides: dict[int, list[int]] = {}
    for place, square in enumerate(squares):
        sides.setdefault(square.shape[1], []).append(place)
    turns: dict[int, Tensor] = {}
    for places in sides.values():
        together = _turn(torch.cat([squares[place] for place in places]))
        parts = together.split([len(squares[place]) for place in places])
        turns.update(zip(places, parts, strict=True))
    found = [turns[place] @ x for place, x in enumerate(wide)]
    return [
        y.mT if one.shape[1] > one.shape[2] else y for y, one in zip(found, stacks, strict=True)
    ]


def _turn(square: Tensor) -> Tensor:
    """T (count, n, n) with T X about U Vᵀ, from X Xᵀ."""
    a, b, c = COEFFICIENTS
    size = square.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None].clamp(min=1e-24)
    square = square / size
    eye = torch.eye(square.shape[1], dtype=square.dtype, device=square.device)
    turn = eye / size.sqrt()
    for left in reversed(range(ITERATIONS)):
        step = torch.baddbmm(a * eye + b * square, square, square, alpha=c)
        turn = step @ turn
        if left:
            square = step @ square @ step
    return turn


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
    # Schedules with an end rate divide by the default.
    return Muon([*plain, *moved], lr=optimizer.defaults["lr"])
