"""Learning rates that differ between matrices: the small one of a pair, and embedding tables."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kronbert import KroneckerEmbedding, KroneckerLinear

RATIO = 4
"""One matrix of a pair is the smaller one if the other has so many times its entries."""


def rate_factors(
    model: nn.Module, small_rate: float = 1.0, embedding_rate: float = 1.0
) -> dict[int, float]:
    """id of a parameter -> what its learning rate is multiplied by; 1 is left out.

    small_rate: for the smaller matrix of every Kronecker pair whose sizes differ at least by
    `RATIO`. Not for a truncated SVD (out x 1) ⊗ (1 x in): its two matrices have equal parts.
    embedding_rate: for embedding tables, dense ones and both matrices of Kronecker ones; a small
    matrix of a table has the product of both."""
    found: dict[int, float] = {}
    for module in model.modules():
        table = isinstance(module, (nn.Embedding, KroneckerEmbedding))
        if table:
            for parameter in module.parameters(recurse=False):
                found[id(parameter)] = embedding_rate
        if not isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            continue
        pairs = zip(module.groups, module.matrices("a"), module.matrices("b"), strict=True)
        for shape, a, b in pairs:
            small, large = sorted((a, b), key=torch.Tensor.numel)
            low_rank = shape.a_in == shape.b_out == 1
            if large.numel() >= RATIO * small.numel() and not low_rank:
                found[id(small)] = found.get(id(small), 1.0) * small_rate
    return {key: factor for key, factor in found.items() if factor != 1}


def split_groups(optimizer: torch.optim.Optimizer, factors: Mapping[int, float]) -> None:
    """Give every parameter named in ``factors`` its rate, in parameter groups of their own.

    The rest of a group (weight decay and so on) stays; groups at the plain rate come first, so that
    the logged learning rate is theirs. Before the scheduler is made, which keeps the ratios."""
    groups = []
    for group in optimizer.param_groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
        for factor, parameters in parts.items():
            groups.append((factor, {**group, "params": parameters, "lr": group["lr"] * factor}))
    # In place: accelerate and schedulers hold this list.
    optimizer.param_groups[:] = [g for _, g in sorted(groups, key=lambda pair: pair[0] != 1)]
