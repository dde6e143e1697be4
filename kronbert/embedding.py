"""`KroneckerEmbedding`: an `nn.Embedding` whose table is a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional
from .decompose import nearest_kronecker
from .linear import KroneckerTerms, dense_weight
from .shapes import KroneckerShape, check_groups


class KroneckerEmbedding(KroneckerTerms):
    """`nn.Embedding` with table ``sum_r a[r] ⊗ b[r]`` (Tahaei et al. 2022, section 3.3).

    ids (...) -> (..., a_in * b_in). Parameters: a (a_out, rank, a_in) with one row per entry (all
    terms of an entry side by side: a lookup reads one row), b (rank, b_out, b_in). b_out is 1 in
    the papers; a truncated SVD of the table is a (entries, rank, 1), b (rank, 1, width).
    padding_idx: that entry's row of a gets no gradient; needs b_out = 1."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        groups: KroneckerShape | Sequence[KroneckerShape],
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.groups = (groups,) if isinstance(groups, KroneckerShape) else tuple(groups)
        check_groups(self.groups, num_embeddings, embedding_dim, "KroneckerEmbedding")
        if padding_idx is not None and padding_idx < 0:
            padding_idx += num_embeddings
        self.padding_idx = padding_idx
        self._new_matrices(
            [((s.a_out, s.rank, s.a_in), (s.rank, s.b_out, s.b_in)) for s in self.groups],
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Entries of the table get variance 1, as `nn.Embedding` gives them; the padding row is 0."""
        for shape, a, b in zip(self.groups, self.matrices("a"), self.matrices("b"), strict=True):
            variance = 1 / (shape.rank * len(self.groups))
            a.normal_(std=variance**0.25)
            b.normal_(std=variance**0.25)
            if self.padding_idx is not None and shape.b_out == 1:
                a[self.padding_idx] = 0

    def forward(self, ids: Tensor) -> Tensor:
        return functional.kron_embedding(
            ids, self.matrices("a"), self.matrices("b"), self.padding_idx
        )

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, groups: KroneckerShape | Sequence[KroneckerShape]
    ) -> tuple[KroneckerEmbedding, float]:
        """The nearest table of these shapes, and its relative error."""
        weight = embedding.weight
        module = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            groups,
            embedding.padding_idx,
            device=weight.device,
            dtype=weight.dtype,
        ).train(embedding.training)
        a, b, error = nearest_kronecker(weight.detach(), module.groups)
        module._fill([one.transpose(0, 1) for one in a], b)
        return module, error

    def to_embedding(self) -> nn.Embedding:
        """The dense twin: the same table, multiplied out in float64."""
        a = [one.transpose(0, 1) for one in self.matrices("a")]
        table = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device=a[0].device,
            dtype=a[0].dtype,
        )
        with torch.no_grad():
            table.weight.copy_(dense_weight(a, self.matrices("b")))
        return table.train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.shapes}{padding}"
