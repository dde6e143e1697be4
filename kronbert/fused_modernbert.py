"""The fused block of ModernBERT: its embeddings.

Ordinary: the layers. They norm before each half, so a fused residual would have to give the sum and
its norm; query, key and value are one dense layer already; the gated feed-forward half (GeGLU) has
no fused form here. A Kronecker layer among them still runs as `functional.kron_linear` does."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.modernbert import modeling_modernbert as modernbert

from .fused_parts import FusedBlock, embed_norm, is_norm, is_table


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
