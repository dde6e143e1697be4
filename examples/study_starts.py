"""Starts of a student that `kronbert.convert` does not have: what the answers depend on counts
more, and blocks that learn one by one before the whole student does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronbert
from kronbert import data_init
from kronbert.distill import Stage
from kronbert.distill.finetune import use_bf16
from kronbert.distill.muon import with_muon
from kronbert.planning import Plan
from kronbert.weighted_fit import Objective, Pair, nearest_outputs

Batch = Mapping[str, Tensor]

DAMPING = 0.1
"""Of a Fisher matrix, as a share of its mean diagonal: outputs that no answer depends on count."""


@contextmanager
def counted_by(fisher: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, init="data" takes the distance of a layer's outputs in the metric that ``fisher``
    (full name -> (out, out)) has for it: (y - ŷ)ᵀ F (y - ŷ). Layers of one truncated SVD."""
    plain = data_init._Fit._fit_layer

    def fit(self: Any, name: str, module: Any, moments: Any) -> Any:
        if name not in fisher or len(module.groups) != 1 or not module.groups[0].low_rank:
            return plain(self, name, module, moments)
        counted = partial(nearest_counted, root=root_of(fisher[name]))
        with patch.object(data_init, "nearest_outputs", counted):
            return plain(self, name, module, moments)

    with patch.object(data_init._Fit, "_fit_layer", fit):
        yield


def by_importance(teacher: Any, plan: Plan, batches: Sequence[Batch]) -> Any:
    """The student of ``plan``, fitted to data `counted_by` the teacher's own Fisher matrices."""
    layers = [one.size.name for one in plan.converted if one.size.kind == "linear"]
    with counted_by(fisher_of(teacher, layers, batches)):
        return kronbert.convert(teacher, plan=plan, init="data", calibration=batches)


def root_of(fisher: Tensor, damping: float = DAMPING) -> Tensor:
    """Square root of the matrix over its mean diagonal, damped; symmetric, float64."""
    scaled = fisher.double() / fisher.diagonal().double().mean().clamp(min=1e-30)
    values, vectors = torch.linalg.eigh(scaled)
    return vectors * (values.clamp(min=0) + damping).sqrt() @ vectors.T


def nearest_counted(
    objective: Objective, groups: Any, start: Sequence[Pair], *, root: Tensor
) -> list[Pair]:
    """`nearest_outputs` of one truncated SVD where R (y - ŷ) counts, R: (out, out). It is the
    nearest R Ŵ, which has the same rank."""
    turned = Objective(objective.gram, root @ objective.cross)
    ((a, b),) = nearest_outputs(turned, groups, start)
    back = torch.linalg.solve(root, a[:, :, 0].T).T
    return [(back[:, :, None].contiguous(), b)]


def fisher_of(teacher: Any, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Of the outputs of each layer: the sum over tokens of g gᵀ, g the gradient of -log p of an
    answer drawn from the teacher's own (Martens and Grosse 2015, K-FAC, section 3)."""
    modules = dict(teacher.named_modules())
    found = {name: torch.zeros(1, dtype=torch.float64) for name in names}
    seen: dict[str, Tensor] = {}
    hooks = [
        modules[name].register_forward_hook(
            lambda module, given, output, name=name: seen.__setitem__(name, output)
        )
        for name in names
    ]
    random = torch.Generator().manual_seed(0)
    try:
        teacher.eval()
        for batch in batches:
            seen.clear()
            with torch.enable_grad():
                logits = teacher(**batch).logits.float()
                wanted = torch.autograd.grad(drawn_loss(logits, random), list(seen.values()))
            mask = batch["attention_mask"].bool()
            for name, gradient in zip(seen, wanted, strict=True):
                tokens = gradient[mask] if gradient.dim() == 3 else gradient
                found[name] = found[name] + (tokens.T @ tokens).double()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def drawn_loss(logits: Tensor, random: torch.Generator) -> Tensor:
    """-log p of answers drawn from p: of classes, or of one number with a variance of one."""
    if logits.shape[-1] == 1:
        drawn = logits.detach() + torch.randn(logits.shape, generator=random)
        return 0.5 * (logits - drawn).square().sum()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
    return F.cross_entropy(logits, drawn, reduction="sum")


def learn_blocks(student: Any, teacher: Any, batches: Sequence[Batch], stage: Stage) -> None:
    """The embeddings, then every layer in turn, learn what the teacher's give, from what the
    student's own predecessors give: one pass each, by the stage's optimiser and rate."""
    mine, theirs = student.base_model, teacher.base_model
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=use_bf16("auto"))
    inputs: list[Any] = [
        {name: value for name, value in batch.items() if name != "attention_mask"}
        for batch in batches
    ]
    masks = [batch["attention_mask"].bool() for batch in batches]
    with torch.no_grad(), autocast():
        wanted = [
            [state.bfloat16() for state in theirs(**batch, output_hidden_states=True).hidden_states]
            for batch in batches
        ]
    student.eval()
    for place, block in enumerate([mine.embeddings, *mine.encoder.layer]):
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(
            block.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay
        )
        if stage.muon_rate is not None:
            optimiser = with_muon(optimiser, block, stage.muon_rate)
        falling = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: 1 - step / max(1, len(batches))
        )
        for given, mask, states in zip(inputs, masks, wanted, strict=True):
            with autocast():
                output = block_output(block, given, mask)
            missed = (output.float() - states[place].float())[mask]
            missed.square().mean().backward()
            optimiser.step()
            falling.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad(), autocast():
            inputs = [
                block_output(block, given, mask) for given, mask in zip(inputs, masks, strict=True)
            ]


def block_output(block: nn.Module, given: Any, mask: Tensor) -> Any:
    """Of the embeddings for ids, of a layer for hidden states. mask: (batch, tokens), bool."""
    if isinstance(given, Mapping):
        return block(**given)
    lowest = torch.finfo(given.dtype).min
    added = torch.zeros(mask.shape, dtype=given.dtype).masked_fill(~mask, lowest)
    found = block(given, attention_mask=added[:, None, None, :])
    return found[0] if isinstance(found, tuple) else found
