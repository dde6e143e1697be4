"""fuse and unfuse: swaps the blocks of a model for fused ones and back, parameters untouched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from torch import nn

from .blocks import Gelu
from .errors import NoMatchError, PlanError, expect_model

if TYPE_CHECKING:
    from .fused_parts import FusedBlock

FAMILIES = ("bert", "roberta", "xlm_roberta", "electra", "distilbert", "modernbert")
"""The packages of transformers.models whose blocks have fused forms."""


@dataclass(frozen=True, kw_only=True)
class FusionReport:
    """blocks: module name -> the fused calls its parts allow (`kronbert.blocks`). gelu: of the
    feed-forward calls; None where the parts of a model were fused with different ones."""

    gelu: Gelu | None
    blocks: Mapping[str, str]

    def __str__(self) -> str:
        calls = Counter(call for form in self.blocks.values() for call in form.split(", "))
        counted = ", ".join(f"{number} {call}" for call, number in sorted(calls.items()))
        return f"{len(self.blocks)} fused blocks ({counted}), gelu={self.gelu or 'mixed'}"


def fuse(model: nn.Module, *, gelu: Gelu = "exact") -> nn.Module:
    """Let the blocks of ``model`` compute in fused calls; in place, returns it.

    For BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT and ModernBERT, converted or dense; of a
    ModernBERT layer the feed-forward half, where converted, and its LayerNorm with the sum before
    it. Same modules, parameters, state_dict and signatures, training included; a saved model is an
    ordinary one. A block whose inner modules carry hooks, or are not of the types fused here (an
    adapter, a quantised layer, another activation), runs its ordinary forward. gelu: "fast" lets
    kernels take a form within 1e-3 of erf. Fusing again switches it. Raises `NoMatchError` for a
    model without a block to fuse."""
    if gelu not in get_args(Gelu):
        raise PlanError(
            f"fuse(gelu={gelu!r}): expected 'exact' (erf) or 'fast' (within 1e-3 of it, for half "
            "precision)."
        )
    expect_model("fuse", model)
    table = _table(model)
    new: dict[nn.Module, type[FusedBlock]] = {}
    replaced = 0
    for module in model.modules():
        if (block := table.get(type(module))) and block.form(module):
            if "forward" in vars(module):
                replaced += 1  # put on the object, where a new class's would not reach
            else:
                new[module] = block
    for module, block in new.items():
        module.__class__ = block
    found = _fused_blocks(model)
    if not found and replaced:
        raise NoMatchError(
            f"fuse: the forward of all {replaced} blocks is replaced, as accelerate does to "
            "offload a model. Load it whole onto one device."
        )
    if not found:
        raise NoMatchError(
            f"fuse: {type(model).__name__} has no block to fuse: expected layers or embeddings of "
            f"{', '.join(FAMILIES)} as transformers builds them, unquantised, with LayerNorm. "
            "Leave it as it is; its Kronecker layers are fast by themselves."
        )
    for fused_block in found.values():
        fused_block.gelu = gelu
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give the blocks of ``model`` their own classes back; in place, returns it. A model that is
    not fused stays as it is."""
    expect_model("unfuse", model)
    found = _fused_blocks(model)
    for name, module in found.items():
        if "ordinary" not in vars(type(module)):
            raise PlanError(
                f"unfuse: {name!r} is a {type(module).__name__}, made of the fused block since "
                "(by FSDP or a parametrisation). Undo that first."
            )
    for module in found.values():
        module.__class__ = module.ordinary  # type: ignore[assignment]
        for name in ("gelu", "_watched"):
            vars(module).pop(name, None)
    return model


def fused(model: nn.Module) -> FusionReport | None:
    """What of ``model`` is fused; None for an ordinary model."""
    found = _fused_blocks(model)
    if not found:
        return None
    forms = {name: type(block).form(block) for name, block in found.items()}
    gelus = {block.gelu for block in found.values()}
    return FusionReport(
        gelu=gelus.pop() if len(gelus) == 1 else None,
        blocks={name: form for name, form in forms.items() if form},
    )


def _fused_blocks(model: nn.Module) -> dict[str, FusedBlock]:
    from .fused_parts import FusedBlock

    return {n: m for n, m in model.named_modules() if isinstance(m, FusedBlock)}


def _table(model: nn.Module) -> dict[type, type[FusedBlock]]:
    """Ordinary class -> fused class, of the architectures in ``model``: the others' modules of
    transformers are not loaded for it."""
    homes = {type(module).__module__ for module in model.modules()}
    families = {f for f in FAMILIES if f"transformers.models.{f}.modeling_{f}" in homes}
    table: dict[type, type[FusedBlock]] = {}
    if families & {"bert", "roberta", "xlm_roberta", "electra"}:
        from . import fused_bert

        table |= _classes(fused_bert)
    if "distilbert" in families:
        from . import fused_distilbert

        table |= _classes(fused_distilbert)
    if "modernbert" in families:
        from . import fused_modernbert

        table |= _classes(fused_modernbert)
    return table


def _classes(home: object) -> dict[type, type[FusedBlock]]:
    """The fused classes that module ``home`` defines, by the class each stands for."""
    from .fused_parts import FusedBlock

    return {
        value.ordinary: value
        for value in vars(home).values()
        if isinstance(value, type) and issubclass(value, FusedBlock) and "ordinary" in vars(value)
    }
