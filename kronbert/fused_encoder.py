"""The fused blocks of an encoder layer as BERT built it; `kronbert.fused_bert` names them.

Fused: the embeddings' sum and LayerNorm; query, key and value; a dense layer with dropout,
residual and LayerNorm; the whole feed-forward half. Ordinary: the attention itself, a decoder's
query, key and value (they meet a cache), cross-attention's, ELECTRA's embeddings_project, poolers
and heads."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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


class FusedEmbeddings(FusedBlock):
    """``dropout(LN(word + token type + position))``; ids (batch, tokens) -> (batch, tokens, width).

    With ``inputs_embeds`` it is the ordinary one."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        held = module._modules
        fits = (
            is_table(held["word_embeddings"])
            and is_lookup(held["position_embeddings"], held["token_type_embeddings"])
            and is_norm(held["LayerNorm"])
            and "token_type_ids" in module._buffers
        )
        return "embed_norm" if fits else None

    def positions(self, ids: Tensor, past: int) -> Tensor:
        return self.position_ids[:, past : past + ids.shape[1]]

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_length: int = 0,
        past_key_values_length: int = 0,  # its name before transformers 5.24
    ) -> Tensor:
        past = cache_length or past_key_values_length
        held: dict[str, Any] = self._modules
        word, layer_norm = held["word_embeddings"], held["LayerNorm"]
        position, kind = held["position_embeddings"], held["token_type_embeddings"]
        if (
            input_ids is None
            or inputs_embeds is not None
            or self.form(self) is None
            or not self.skips(word, position, kind, layer_norm)
        ):
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past)
        if position_ids is None:
            position_ids = self.positions(input_ids, past)
        if token_type_ids is None:
            token_type_ids = self.token_type_ids[:, :1]  # the buffer is all zeros: one for all
        x = embed_norm(
            input_ids,
            word,
            layer_norm,
            position=lookup(position_ids, position),
            kind=lookup(token_type_ids, kind),
        )
        return self.dropout(x)


class FusedPaddedEmbeddings(FusedEmbeddings):
    """Positions count from padding_idx + 1 and pass over padding."""

    def positions(self, ids: Tensor, past: int) -> Tensor:
        return self.create_position_ids_from_input_ids(ids, self.padding_idx, past)


class FusedSelfAttention(FusedBlock):
    """Query, key and value from one call: (..., tokens, width) -> the same, and the weights."""

    eager: ClassVar[Callable[..., Any]]
    """The attention of ``attn_implementation="eager"``: each architecture has its own."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        held = module._modules
        fits = is_kronecker(held["query"], held["key"], held["value"])
        return "qkv" if fits and not module.is_decoder else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # its name before transformers 5.24
        **kwargs: Any,
    ) -> Any:
        held: dict[str, Any] = self._modules
        maps = held["query"], held["key"], held["value"]
        past = past_key_values if cache is None else cache
        if past is not None or self.form(self) is None or not self.skips(*maps):
            return super().forward(hidden_states, attention_mask, past, **kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = held["dropout"].p if self.training else 0.0
        if not dropout and is_plain_sdpa(self, attend, kwargs):
            q, k, v = map(linear, maps)
            heads, scale = self.num_attention_heads, self.scaling
            y = blocks.attention(hidden_states, q, k, v, heads, scale, attention_mask)
            if y is not None:
                return y, None
        split = (-1, self.attention_head_size)
        query, key, value = (
            x.unflatten(-1, split).transpose(-3, -2)
            for x in blocks.qkv(hidden_states, *map(linear, maps))
        )
        y, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return y.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


class FusedOutput(FusedBlock):
    """``LN(input_tensor + dropout(dense(hidden_states)))``; a dense `nn.Linear` stays a call."""

    @classmethod
    def form(cls, module: Any) -> str | None:
        held = module._modules
        if not (is_norm(held["LayerNorm"]) and is_dropout(held["dropout"])):
            return None
        return "linear_norm" if is_kronecker(held["dense"]) else "residual_norm"

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        form = self.form(self)
        held: dict[str, Any] = self._modules
        dense, layer_norm, dropout = held["dense"], held["LayerNorm"], held["dropout"]
        skipped = (layer_norm, dropout, dense)[: 3 if form == "linear_norm" else 2]
        if form is None or not self.skips(*skipped):
            return super().forward(hidden_states, input_tensor)
        after, p = norm(layer_norm), probability(dropout)
        if form == "linear_norm":
            return blocks.linear_norm(hidden_states, linear(dense), input_tensor, after, dropout=p)
        return blocks.residual_norm(dense(hidden_states), input_tensor, after, dropout=p)


class FusedLayer(FusedBlock):
    """A layer whose feed-forward half is one call when both its dense layers are Kronecker."""

    expands: ClassVar[type[nn.Module]]
    contracts: ClassVar[tuple[type[nn.Module], ...]]

    @classmethod
    def form(cls, module: Any) -> str | None:
        expand, contract = module._modules["intermediate"], module._modules["output"]
        if type(expand) is not cls.expands or type(contract) not in cls.contracts:
            return None
        first, last = expand._modules, contract._modules
        fits = (
            is_kronecker(first["dense"], last["dense"])
            and is_gelu(first.get("intermediate_act_fn"))  # a bare function is no module
            and is_norm(last["LayerNorm"])
            and is_dropout(last["dropout"])
        )
        return "ffn_norm" if fits else None

    @property
    def feed_forward_chunk(self) -> Callable[[Tensor], Tensor]:
        """transformers counts its arguments at every call: 30 us, unless the function holds its
        signature, which torch.compile cannot read."""
        return self._chunk if torch.compiler.is_compiling() else self._signed_chunk

    def _chunk(self, attention_output: Tensor) -> Tensor:
        expand: Any = self._modules["intermediate"]
        contract: Any = self._modules["output"]
        skipped = (expand, contract, *expand._modules.values(), *contract._modules.values())
        if self.form(self) is None or not self.skips(*skipped):
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        first, last = expand._modules, contract._modules
        return blocks.ffn_norm(
            attention_output,
            linear(first["dense"]),
            linear(last["dense"]),
            norm(last["LayerNorm"]),
            gelu=self.gelu,
            dropout=probability(last["dropout"]),
        )

    def _signed_chunk(self, attention_output: Tensor) -> Tensor:
        return self._chunk(attention_output)

    _signed_chunk.__signature__ = signature(_signed_chunk)  # type: ignore[attr-defined]
