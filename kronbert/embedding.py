"""`KroneckerEmbedding`: an `nn.Embedding` whose table is a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional
from .decompose import nearest_kronecker
from .errors import ShapeError
from .linear import KroneckerTerms
from .shapes import KroneckerShape, check_groups, partial, table_starts
from .weighted_fit import nearest_blocks


class KroneckerEmbedding(KroneckerTerms):
    """`nn.Embedding` with table ``sum_r a[r] ⊗ b[r]`` (Tahaei et al. 2022, section 3.3).

    ids (...) -> (..., a_in * b_in). Parameters: a (a_out, rank, a_in) with one row per entry (all
    terms of an entry side by side: a lookup reads one row), b (rank, b_out, b_in). b_out is 1 in
    the papers; a truncated SVD of the table is a (entries, rank, 1), b (rank, 1, width). Groups
    after the first may make a block of rows only, ``shape.start`` on: words that are frequent get
    more terms than others (Chen et al. 2018, GroupReduce; Baevski and Auli 2019, section 3).
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
        check_groups(self.groups, num_embeddings, embedding_dim, "KroneckerEmbedding", table=True)
        self.starts = table_starts(self.groups, num_embeddings)
        self.padding_idx = self._checked_padding(padding_idx)
        self._new_matrices(
            [((s.a_out, s.rank, s.a_in), (s.rank, s.b_out, s.b_in)) for s in self.groups],
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Entries of the table get variance 1, as `nn.Embedding` gives them; padding's are 0.

        Rows of a block get more: what the block adds."""
        whole = sum(not partial(shape, self.num_embeddings) for shape in self.groups)
        for shape, a, b in zip(self.groups, self.matrices("a"), self.matrices("b"), strict=True):
            variance = 1 / (shape.rank * whole)
            a.normal_(std=variance**0.25)
            b.normal_(std=variance**0.25)
            if self.padding_idx is not None:
                row = self.padding_idx - shape.start
                if 0 <= row < shape.a_out:
                    a[row] = 0

    def forward(self, ids: Tensor) -> Tensor:
        return functional.kron_embedding(
            ids, self.matrices("a"), self.matrices("b"), self.padding_idx, starts=self.starts
        )

    @property
    def weight(self) -> Tensor:
        """The dense table (entries, width), multiplied out at every reading, with gradients.

        For code that reads past the module; it takes the memory that `forward` avoids."""
        return functional.rebuild_table(self.matrices("a"), self.matrices("b"), self.starts)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, groups: KroneckerShape | Sequence[KroneckerShape]
    ) -> tuple[KroneckerEmbedding, float]:
        """The nearest table of these shapes, and its relative error."""
        weight = embedding.weight
        # Made on the meta device: the initial values would be thrown away, and take random numbers.
        module = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            groups,
            embedding.padding_idx,
            device="meta",
            dtype=weight.dtype,
        )
        module.to_empty(device=weight.device)
        if module.starts is None:
            a, b, error = nearest_kronecker(weight.detach(), module.groups)
        else:
            pairs, error = nearest_blocks(weight.detach(), module.groups)
            a, b = ([pair[i] for pair in pairs] for i in range(2))
        module._fill([one.transpose(0, 1) for one in a], b, weight)
        return module.train(embedding.training), error

    def to_embedding(self) -> nn.Embedding:
        """The dense twin: the same table, multiplied out in float64."""
        a, b = ([one.detach() for one in self.matrices(letter)] for letter in "ab")
        table = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        exact = functional.rebuild_table(
            [one.double() for one in a], [one.double() for one in b], self.starts
        )
        trained = self.matrices("a")[0].requires_grad
        table.weight = nn.Parameter(exact.to(a[0].dtype), trained)
        return table.train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.shapes}{padding}"

    def _checked_padding(self, padding_idx: int | None) -> int | None:
        """``padding_idx`` counted from the start."""
        if padding_idx is None:
            return None
        if not -self.num_embeddings <= padding_idx < self.num_embeddings:
            raise ShapeError(
                f"KroneckerEmbedding: padding_idx={padding_idx}: expected an entry of the table, "
                f"below {self.num_embeddings}."
            )
        if any(shape.b_out != 1 for shape in self.groups):
            raise ShapeError(
                f"KroneckerEmbedding: {self.shapes} with padding_idx={padding_idx}: the entries "
                "share rows, so one of them cannot go without gradients. Use a shape with "
                "b_out = 1, or padding_idx=None."
            )
        return padding_idx % self.num_embeddings
