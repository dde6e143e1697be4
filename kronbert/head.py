"""`KroneckerLMHead`: the output layer tied to a `KroneckerEmbedding`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .embedding import KroneckerEmbedding
from .errors import KronbertError


class KroneckerLMHead(nn.Module):
    """Logits over a vocabulary whose table is Kronecker: h (..., width) -> (..., entries).

    The table's matrices stay the embedding's parameters; the head owns only a bias, so tying
    survives saving, copying and training without a second set of names. The (entries, width)
    matrix is never rebuilt: for a word embedding ``1 x n`` a product costs n times fewer FLOPs."""

    bias: nn.Parameter | None

    def __init__(self, embedding: KroneckerEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # A plain attribute: registered, the embedding would be saved twice and counted twice.
        self.__dict__["embedding"] = embedding
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    @property
    def table(self) -> KroneckerEmbedding:
        """The embedding whose matrices the head reads."""
        return self.__dict__["embedding"]

    @property
    def weight(self) -> Tensor:
        """The embedding's dense table, multiplied out at every reading: see there."""
        return self.table.weight

    def forward(self, h: Tensor) -> Tensor:
        table = self.table
        offloaded = getattr(table, "_hf_hook", None)  # accelerate's: loads what a call will read
        if offloaded is None:
            return self._logits(h, table)
        offloaded.pre_forward(table)
        return offloaded.post_forward(table, self._logits(h, table))

    def _logits(self, h: Tensor, table: KroneckerEmbedding) -> Tensor:
        a, b = table.matrices("a"), table.matrices("b")
        return functional.kron_logits(h, a, b, self.bias, starts=table.starts)

    def _replicate_for_data_parallel(self) -> Any:
        raise KronbertError(
            "nn.DataParallel: the replicas of a KroneckerLMHead would read the matrices of the "
            "first device's table. Train by DistributedDataParallel (torchrun, accelerate launch)."
        )

    def to_linear(self, table: nn.Embedding) -> nn.Linear:
        """The dense twin, tied to ``table``, the dense twin of its embedding."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = table.weight
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, tied to {self.table.shapes}, bias={self.bias is not None}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, torch.Tensor):
            raise AttributeError(
                "KroneckerLMHead has no weight of its own: its table is the tied "
                "KroneckerEmbedding. kronbert.merge(model) gives a dense head."
            )
        super().__setattr__(name, value)
