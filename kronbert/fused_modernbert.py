"""The fused blocks of ModernBERT, whose layers norm before each of their halves.

Fused: the embeddings' LayerNorm; the sum after the attention with the LayerNorm before the
feed-forward half, converted or dense; that half (GeGLU) as one call when both its maps are
Kronecker. Ordinary: the attention, whose query, key and value are one map as it is, its LayerNorm,
the sum that ends a layer (what follows it is the next layer's), the heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.modernbert import modeling_modernbert as modernbert

from . import blocks
from .fused_parts import (
    FusedBlock,
    embed_norm,
    is_dropout,
    is_gelu,
    is_kronecker,
    is_norm,
    is_table,
    linear,
    norm,
    probability,
)


class FusedModernBertEmbeddings(FusedBlock, modernbert.ModernBertEmbeddings):
    """``dropout(LN(word))``: ids (...) -> (..., width). With ``inputs_embeds`` ordinary."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        return "embed_norm" if is_table(module.tok_embeddings) and is_norm(module.norm) else None

    def forward(self, input_ids: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        table, layer_norm = self.tok_embeddings, self.norm
        if (
            input_ids is None
            or inputs_embeds is not None
            or self.form(self) is None
            or not self.skips(table, layer_norm)
        ):
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds)
        return self.drop(embed_norm(input_ids, table, layer_norm))


class FusedModernBertMLP(FusedBlock, modernbert.ModernBertMLP):
    """``Wo(dropout(gelu(u) * g))``, u and g the halves of ``Wi(x)``: x (..., width)."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        held = module._modules
        fits = (
            is_kronecker(held["Wi"], held["Wo"])
            and is_gelu(held.get("act"))  # a bare function is no module
            and is_dropout(held["drop"])
        )
        return "gated_ffn" if fits else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        held: dict[str, Any] = self._modules
        if self.form(self) is None or not self.skips(*held.values()):
            return super().forward(hidden_states)
        return blocks.gated_ffn(
            hidden_states,
            linear(held["Wi"]),
            linear(held["Wo"]),
            gelu=self.gelu,
            dropout=probability(held["drop"]),
        )


class FusedModernBertEncoderLayer(FusedBlock, modernbert.ModernBertEncoderLayer):
    """``s + mlp(LN(s))``, ``s = x + attn(LN(x))``, with s and ``LN(s)`` from one call."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        return "add_norm" if is_norm(module._modules["mlp_norm"]) else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        held: dict[str, Any] = self._modules
        layer_norm = held["mlp_norm"]
        given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        if self.form(self) is None or not self.skips(layer_norm):
            return super().forward(hidden_states, **given, **kwargs)
        y, _ = held["attn"](held["attn_norm"](hidden_states), **given, **kwargs)
        total, normed = blocks.add_norm(y, hidden_states, norm(layer_norm))
        return total + held["mlp"](normed)
