"""The models in a model that transformers saves, each with a config that can hold a plan."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from .joined import refuse_joined
from .planning import Plan


def saved_parts(model: nn.Module) -> dict[str, Any]:
    """What transformers saves, with a config that can hold a plan: name in ``model`` -> model.

    The model itself, or those that a wrapper holds (SentenceTransformer, one's own), and their
    parts that have a config of their own and may be saved alone (an encoder-decoder's encoder)."""
    from transformers import PreTrainedModel

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            around = [part for outer, part in found.items() if _inside(name, outer)]
            if not any(module.config is part.config for part in around):
                found[name] = module
    return found


def plans_of_parts(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """Of each of `saved_parts`, by name: its layers of the plan, as its config.json holds them."""
    from .hf import KroneckerQuantizationConfig

    names = [layer.size.name for layer in plan.converted]
    for name, part in saved_parts(model).items():
        prefix = f"{name}." if name else ""
        refuse_joined(part, [n.removeprefix(prefix) for n in names if n.startswith(prefix)])
    return {
        name: KroneckerQuantizationConfig.from_plan(plan, prefix, part.num_parameters())
        for name, part in saved_parts(model).items()
        if any(one.startswith(prefix := f"{name}." if name else "") for one in names)
    }


def own_configs(model: nn.Module) -> None:
    """Other models may have been made with the same config objects, and this one's say more now.

    Of the models in ``model`` that are saved, every one that does not lie inside another has copies
    of its own; a config inside a config stays inside its copy."""
    parts = saved_parts(model)
    for name, part in parts.items():
        if any(_inside(name, outer) for outer in parts):
            continue
        memo: dict[int, Any] = {}
        for module in part.modules():
            config = vars(module).get("config")
            if isinstance(config, PretrainedConfig):
                module.config = copy.deepcopy(config, memo)


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))
