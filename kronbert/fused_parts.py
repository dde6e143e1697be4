"""What fused blocks share: when a block may leave its modules uncalled, and how it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import blocks
from .embedding import KroneckerEmbedding
from .linear import KroneckerLinear


class FusedBlock(nn.Module):
    """A transformers block that computes in fused calls; same modules, parameters and signature.

    Never constructed: `kronbert.fuse` makes it the class of a block that exists. A concrete one
    derives from this and, last, from the class whose objects it takes (``ordinary``), to whose
    forward it turns whenever a module it would leave uncalled is watched or of another type."""

    ordinary: ClassVar[type[nn.Module]]
    gelu: blocks.Gelu = "exact"
    _watched: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        last: Any = cls.__bases__[-1]
        if not issubclass(last, FusedBlock):
            cls.ordinary = last
            # transformers, accelerate and FSDP find the blocks to keep whole by their class's
            # name; pickle goes by __qualname__.
            cls.__name__ = last.__name__

    @classmethod
    def form(cls, module: Any) -> str | None:
        """The fused calls that the types of ``module``'s parts allow; None for none.

        Asked at every call, so it looks modules up in ``_modules``: `nn.Module.__getattr__` takes
        several times as long."""
        raise NotImplementedError

    def skips(self, *modules: nn.Module, part: str = "") -> bool:
        """Whether this call may leave ``modules`` uncalled: nobody watches them.

        Gradient checkpointing repeats a call during the backward pass, when a tap's hooks may be
        gone: the repetition goes the way of the first. part: which of a block's decisions it is."""
        if part in self._watched and torch._C._current_graph_task_id() != -1:
            return False
        watched = bool(_has_any_global_hook()) or is_watched(*modules)
        if watched != (part in self._watched):
            self._watched = self._watched ^ {part}
        return not watched

    def _get_name(self) -> str:
        return type(self).__qualname__

    if TYPE_CHECKING:  # the attributes of ``ordinary``

        def __getattr__(self, name: str) -> Any: ...


# These run at every call of every block: loops, since a generator costs more than what it checks.


def is_watched(*modules: nn.Module) -> bool:
    """Whether somebody counts on one of ``modules`` being called: hooks, or a forward put on the
    object (accelerate's offloading, Hugging Face kernels)."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


def is_kronecker(*modules: Any) -> bool:
    for module in modules:
        if type(module) is not KroneckerLinear:
            return False
    return True


def is_norm(module: nn.Module) -> bool:
    """A LayerNorm over the last dimension, with a weight; no subclass, no parametrisation."""
    return (
        type(module) is nn.LayerNorm
        and len(module.normalized_shape) == 1
        and module.elementwise_affine
    )


def is_dropout(module: nn.Module) -> bool:
    return type(module) is nn.Dropout


def is_gelu(module: Any) -> bool:
    """The erf GELU, as transformers or torch builds it."""
    if type(module) is nn.GELU:
        return module.approximate == "none"
    return type(module) is GELUActivation and module.act is F.gelu


def is_plain_sdpa(module: Any, attend: Any, given: Mapping[str, Any]) -> bool:
    """Whether ``attend`` would be torch's attention of whole sequences, by mask and scale alone."""
    return (
        attend is sdpa_attention_forward
        and not getattr(module, "is_causal", True)
        and not given.keys() & _CHANGES_ATTENTION
    )


_CHANGES_ATTENTION = {"is_causal", "position_bias", "cache", "softcap"}


def is_lookup(*modules: nn.Module) -> bool:
    """Dense tables that are only read: max_norm writes to the table, sparse and scale_grad_by_freq
    change its gradient."""
    for module in modules:
        if (
            type(module) is not nn.Embedding
            or module.max_norm is not None
            or module.scale_grad_by_freq
            or module.sparse
        ):
            return False
    return True


def is_table(module: nn.Module) -> bool:
    return type(module) is KroneckerEmbedding or is_lookup(module)


def linear(module: nn.Module) -> blocks.Linear:
    """What a block reads of a `KroneckerLinear`."""
    assert isinstance(module, KroneckerLinear)  # is_kronecker saw to it
    return blocks.Linear(module.matrices("a"), module.matrices("b"), module.bias)


def norm(module: nn.Module) -> blocks.Norm:
    assert isinstance(module, nn.LayerNorm)  # is_norm saw to it
    return blocks.Norm(module.weight, module.bias, module.eps)


def lookup(ids: Tensor, module: nn.Module) -> blocks.Lookup:
    assert isinstance(module, nn.Embedding)  # is_lookup saw to it
    return blocks.Lookup(ids, module.weight, module.padding_idx)


def probability(module: nn.Module) -> float:
    """The dropout probability of this call."""
    assert isinstance(module, nn.Dropout)  # is_dropout saw to it
    return module.p if module.training else 0.0


def embed_norm(
    ids: Tensor,
    table: Any,
    layer_norm: nn.Module,
    *,
    position: blocks.Lookup | None = None,
    kind: blocks.Lookup | None = None,
) -> Tensor:
    """`blocks.embed_norm` of modules: ids (...) -> (..., width)."""
    converted = isinstance(table, KroneckerEmbedding)
    return blocks.embed_norm(
        ids,
        table.matrices("a") if converted else [table.weight],
        table.matrices("b") if converted else [],
        norm(layer_norm),
        position=position,
        kind=kind,
        padding_idx=table.padding_idx,
        starts=table.starts if converted else None,
    )
