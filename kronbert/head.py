"""`KroneckerLMHead`: the output layer tied to a `KroneckerEmbedding`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional
from .embedding import KroneckerEmbedding


class KroneckerLMHead(nn.Module):
    """Logits over a vocabulary whose table is Kronecker: h (..., width) -> (..., entries).

    The table's matrices stay the embedding's parameters; the head owns only a bias, so tying
    survives saving, copying and training without a second set of names. The (entries, width)
    matrix is never rebuilt: for a word embedding ``1 x n`` a product costs n times fewer FLOPs."""

    def __init__(self, embedding: KroneckerEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # A plain attribute: registered, the embedding would be saved twice and counted twice.
        self.__dict__["embedding"] = embedding
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    def forward(self, h: Tensor) -> Tensor:
        table: KroneckerEmbedding = self.__dict__["embedding"]
        return functional.kron_logits(h, table.matrices("a"), table.matrices("b"), self.bias)

    def to_linear(self, table: nn.Embedding) -> nn.Linear:
        """The dense twin, tied to ``table``, the dense twin of its embedding."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = table.weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        tied = self.__dict__["embedding"].shapes
        return f"{self.in_features}, {self.out_features}, tied to {tied}, bias={self.bias is not None}"

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight" and isinstance(value, (torch.Tensor, nn.Parameter)):
            raise AttributeError(
                "KroneckerLMHead has no weight: its table is the tied KroneckerEmbedding. "
                "kronbert.merge(model) gives a dense head."
            )
        super().__setattr__(name, value)
