"""The fused blocks of DistilBERT, whose layer norms its parts' outputs itself.

Fused: the embeddings' sum and LayerNorm; query, key and value; the attention's dense layer with
residual and LayerNorm; the whole feed-forward half. Ordinary: the attention itself, the heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.distilbert import modeling_distilbert as distilbert

from . import blocks
from .fused_parts import (
    FusedBlock,
    embed_norm,
    is_dropout,
    is_gelu,
    is_kronecker,
    is_lookup,
    is_norm,
    is_plain_sdpa,
    is_table,
    linear,
    lookup,
    norm,
    probability,
)


class FusedDistilBertEmbeddings(FusedBlock, distilbert.Embeddings):
    """``dropout(LN(word + position))``: ids (batch, tokens) -> (batch, tokens, width)."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        held = module._modules
        fits = (
            is_table(held["word_embeddings"])
            and is_lookup(held["position_embeddings"])
            and is_norm(held["LayerNorm"])
            and "position_ids" in module._buffers
        )
        return "embed_norm" if fits else None

    def forward(
        self,
        input_ids: Any = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Any = None,
    ) -> Tensor:
        word, position, layer_norm = self.word_embeddings, self.position_embeddings, self.LayerNorm
        if (
            input_ids is None
            or self.form(self) is None
            or not self.skips(word, position, layer_norm)
        ):
            return super().forward(input_ids, inputs_embeds, position_ids)
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        x = embed_norm(input_ids, word, layer_norm, position=lookup(position_ids, position))
        return self.dropout(x)


class FusedDistilBertSelfAttention(FusedBlock, distilbert.DistilBertSelfAttention):
    """Query, key and value from one call; `context` is what the block's fused half starts from."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        held = module._modules
        return "qkv" if is_kronecker(held["q_lin"], held["k_lin"], held["v_lin"]) else None

    def context(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """What ``out_lin`` is given (batch, tokens, width), and the attention's weights."""
        maps = self.q_lin, self.k_lin, self.v_lin
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, distilbert.eager_attention_forward
        )
        dropout = self.dropout.p if self.training else 0.0
        fused = self.form(self) is not None and self.skips(*maps)
        if fused and not dropout and is_plain_sdpa(self, attend, kwargs):
            q, k, v = map(linear, maps)
            heads, scale = self.n_heads, self.scaling
            y = blocks.attention(hidden_states, q, k, v, heads, scale, attention_mask)
            if y is not None:
                return y, None
        if fused:
            projected = blocks.qkv(hidden_states, *map(linear, maps))
        else:
            projected = maps[0](hidden_states), maps[1](hidden_states), maps[2](hidden_states)
        split = (-1, self.attention_head_size)
        query, key, value = (x.unflatten(-1, split).transpose(-3, -2) for x in projected)
        y, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return y.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        y, weights = self.context(hidden_states, attention_mask, **kwargs)
        return self.out_lin(y), weights


class FusedTransformerBlock(FusedBlock, distilbert.TransformerBlock):
    """A layer whose two LayerNorms take in the residual and, where Kronecker, what comes before."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        held = module._modules
        if not (is_norm(held["sa_layer_norm"]) and is_norm(held["output_layer_norm"])):
            return None
        attention = "linear_norm" if cls.projects(module) else "residual_norm"
        return f"{attention}, {'ffn_norm' if cls.expands(module) else 'residual_norm'}"

    @staticmethod
    def projects(module: Any) -> bool:
        """Whether the types let the attention's dense layer and its LayerNorm be one call."""
        attention = module._modules["attention"]
        kinds = distilbert.DistilBertSelfAttention, FusedDistilBertSelfAttention
        return (
            type(attention) in kinds
            and FusedDistilBertSelfAttention.form(attention) is not None
            and is_kronecker(attention._modules["out_lin"])
        )

    @staticmethod
    def expands(module: Any) -> bool:
        """Whether the types let the feed-forward half be one call."""
        ffn = module._modules["ffn"]
        if type(ffn) is not distilbert.FFN or ffn.chunk_size_feed_forward:
            return False
        held: dict[str, Any] = ffn._modules
        return (
            is_kronecker(held["lin1"], held["lin2"])
            and is_gelu(held.get("activation"))  # a bare function is no module
            and is_dropout(held["dropout"])
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        held: dict[str, Any] = self._modules
        first, last = held["sa_layer_norm"], held["output_layer_norm"]
        if self.form(self) is None or not self.skips(first, last):
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        attention, ffn = held["attention"], held["ffn"]
        if (
            self.projects(self)
            and isinstance(attention, FusedDistilBertSelfAttention)
            and self.skips(attention, attention.out_lin, part="attention")
        ):
            y, _ = attention.context(hidden_states, attention_mask=attention_mask, **kwargs)
            x = blocks.linear_norm(y, linear(attention.out_lin), hidden_states, norm(first))
        else:
            y, _ = attention(hidden_states, attention_mask=attention_mask, **kwargs)
            x = blocks.residual_norm(y, hidden_states, norm(first))
        if self.expands(self) and self.skips(ffn, *ffn._modules.values(), part="ffn"):
            return blocks.ffn_norm(
                x,
                linear(ffn.lin1),
                linear(ffn.lin2),
                norm(last),
                gelu=self.gelu,
                dropout=probability(ffn.dropout),
            )
        return blocks.residual_norm(ffn(x), x, norm(last))
