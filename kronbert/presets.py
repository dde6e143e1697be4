"""The shapes of the published KroneckerBERT models, as data.

Tahaei et al. 2022 (arXiv 2109.06243), Table 1. A preset names the *small* matrix of each product;
the large one follows from the layer's size, so a preset fits any width its numbers divide.
K5's attention is corrected to a_in = 48: as printed (384, 384) it is larger than the dense layer.
K19 is arXiv version 1's model, whose shape table was never published: K21's layers with n = 12
land on its 5.7 M parameters and 19 times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import PlanError, ShapeError, near
from .shapes import KroneckerShape


@dataclass(frozen=True, kw_only=True)
class Small:
    """The small matrix (out, inner) of a product, and whether it is ``a`` or ``b``."""

    side: Literal["a", "b"]
    out: int
    inner: int
    rank: int = 1

    def shape(self, out: int, inner: int, where: str) -> KroneckerShape:
        """The full shape for an (out, inner) weight; `ShapeError` when the sizes do not divide."""
        if out % self.out or inner % self.inner:
            raise ShapeError(
                f"{where}: the preset's {self.side} of {self.out}x{self.inner} does not divide "
                f"{out}x{inner}. Use factor= instead of preset=, or a rule for this layer."
            )
        big = (out // self.out, inner // self.inner)
        small = (self.out, self.inner)
        a, b = (small, big) if self.side == "a" else (big, small)
        return KroneckerShape(*a, *b, rank=self.rank)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """attention, expand (feed-forward in -> wide), contract (wide -> out), word embedding.

    source: where the shapes come from, and BERT-base's size and factor with them."""

    attention: Small
    expand: Small
    contract: Small
    embedding: Small
    source: str


PRESETS: dict[str, Preset] = {
    "k5": Preset(
        attention=Small(side="b", out=2, inner=16, rank=4),
        expand=Small(side="b", out=8, inner=2, rank=4),
        contract=Small(side="b", out=2, inner=8, rank=4),
        embedding=Small(side="b", out=1, inner=12),
        source="KroneckerBERT5, Table 1 with attention corrected; 20.8 M, 5.3x of BERT-base",
    ),
    "k8": Preset(
        attention=Small(side="b", out=2, inner=2),
        expand=Small(side="a", out=8, inner=2),
        contract=Small(side="a", out=2, inner=8),
        embedding=Small(side="b", out=1, inner=8),
        source="KroneckerBERT8, Table 1; 14.7 M with a dense pooler, 7.5x of BERT-base",
    ),
    "k19": Preset(
        attention=Small(side="b", out=2, inner=16),
        expand=Small(side="a", out=16, inner=2),
        contract=Small(side="a", out=2, inner=16),
        embedding=Small(side="b", out=1, inner=12),
        source="arXiv v1's 19x model, shapes fitted to its size; 5.7 M, 19.15x of BERT-base",
    ),
    "k21": Preset(
        attention=Small(side="b", out=2, inner=16),
        expand=Small(side="a", out=16, inner=2),
        contract=Small(side="a", out=2, inner=16),
        embedding=Small(side="b", out=1, inner=16),
        source="KroneckerBERT21, Table 1; 5.2 M, 20.9x of BERT-base",
    ),
}


def preset(name: str) -> Preset:
    """The preset called ``name``; `PlanError` with near names otherwise."""
    if not isinstance(name, str) or name.lower() not in PRESETS:
        raise PlanError(f"preset={name!r} is unknown. {near(str(name), tuple(PRESETS))}")
    return PRESETS[name.lower()]
