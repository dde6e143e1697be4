"""Hooks on layers that are to be replaced: those of others are refused, transformers' own move."""

from __future__ import annotations

from torch import nn

from .errors import PlanError


def check_hooks(name: str, module: nn.Module) -> None:
    """Refuse hooks that a new module would lose, but for the one that `renew_input_hooks` sets."""
    hooks = [
        key
        for key, value in vars(module).items()
        if key.endswith("_hooks") and any(not _is_input_hook(hook) for hook in value.values())
    ]
    if hooks or "forward" in vars(module):
        raise PlanError(
            f"{name!r} carries hooks ({hooks[0] if hooks else 'its forward is replaced'}), which a "
            "new module would lose. Remove them, or keep the layer as it is."
        )


def renew_input_hooks(model: nn.Module) -> None:
    """Let the outputs of new word tables require gradients where those of the old ones did.

    transformers sets that hook with gradient checkpointing, and leaves it there afterwards."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and getattr(part, "_require_grads_hooks", None):
            part.disable_input_require_grads()
            part.enable_input_require_grads()


def _is_input_hook(hook: object) -> bool:
    return "enable_input_require_grads" in getattr(hook, "__qualname__", "")
