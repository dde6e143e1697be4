"""The models in a model that transformers saves, each with a config that can hold a plan."""

from __future__ import annotations

import copy
import warnings
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
    """Of each of `saved_parts`, by name: its layers of the plan, as its config.json holds them.

    By identity: of a module that two parts share, the plan has one of its names."""
    from .hf import KroneckerQuantizationConfig

    rows = {layer.size.name: layer for layer in plan.converted}
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Any] = {}
    for name, part in saved_parts(model).items():
        own = {
            inside: rows[names[id(module)]]
            for inside, module in part.named_modules()
            if names[id(module)] in rows
        }
        if own:
            refuse_joined(part, own)
            found[name] = KroneckerQuantizationConfig.of_layers(own, part.num_parameters())
    return found


def warn_of_lenient_loading(model: nn.Module) -> None:
    """huggingface_hub's mixin fills the layers of which it finds the names, and says nothing of
    the others."""
    if any(base.__name__ == "ModelHubMixin" for base in type(model).__mro__):
        warnings.warn(
            f"{type(model).__name__}.from_pretrained is huggingface_hub's, which would build the "
            "dense layers and leave them random: it knows no student. Load one with strict=True to "
            "be told; save kronbert.merge(student), or what transformers made inside of it.",
            stacklevel=3,
        )


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
