"""How far a student's weights are from its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .embedding import KroneckerEmbedding
from .linear import KroneckerLinear


@torch.no_grad()
def weight_errors(
    student: nn.Module, teacher: nn.Module
) -> tuple[dict[str, float], tuple[str, ...]]:
    """(errors, unmatched) of the student's Kronecker layers against the teacher's weights.

    error: ||W_student - W_teacher|| / ||W_teacher|| in the Frobenius norm, in float64. Layers are
    matched by name, with either model's ``base_model_prefix`` added or removed; between models of
    unequal depth the numbered ones are not, as theirs may be another layer's."""
    modules = dict(teacher.named_modules())
    prefixes = {getattr(model, "base_model_prefix", "") + "." for model in (student, teacher)}
    prefixes -= {"."}
    configs = [getattr(model, "config", None) for model in (student, teacher)]
    depths = {getattr(config, "num_hidden_layers", None) for config in configs} - {None}
    errors: dict[str, float] = {}
    unmatched = []
    for name, module in student.named_modules():
        if not isinstance(module, KroneckerLinear | KroneckerEmbedding):
            continue
        names = [name, *(p + name for p in prefixes), *(name.removeprefix(p) for p in prefixes)]
        exact = next((_weight(modules[n]) for n in names if n in modules), None)
        weight = _weight(module)
        assert weight is not None  # it has one
        numbered = any(part.isdigit() for part in name.split("."))
        if exact is None or exact.shape != weight.shape or (numbered and len(depths) > 1):
            unmatched.append(name)
            continue
        norm = exact.norm().item()
        missed = (weight.to(exact.device) - exact).norm().item()
        errors[name] = missed / norm if norm else 0.0
    return errors, tuple(unmatched)


def _weight(module: nn.Module) -> Tensor | None:
    """The dense weight (out, in) or table (entries, width) in float64; None if there is none."""
    if isinstance(module, KroneckerLinear):
        module = module.to_linear()
    elif isinstance(module, KroneckerEmbedding):
        module = module.to_embedding()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    # transformers' Conv1D stores (in, out) and names its sizes nx and nf.
    return (weight.T if hasattr(module, "nf") else weight).detach().double()
