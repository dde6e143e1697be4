"""`FitReport`: how closely every converted layer meets its teacher's outputs, for both inits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """Relative output errors sqrt(E||y - ŷ||² / E||y - E y||²) of one layer, y the teacher's output
    and ŷ the layer's on the student's own inputs, on the calibration text.

    weights_error: of the fit to the weight alone, with the teacher's bias; data_error: of the fit
    to the outputs; both None where the calibration never reaches the layer. kept: why the fit to
    the weight alone stayed, None where it did not."""

    weights_error: float | None = None
    data_error: float | None = None
    kept: str | None = None


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What ``convert(init="data")`` did: full name -> `LayerFit` in the order of fitting; tokens:
    how many positions of the calibration counted."""

    layers: Mapping[str, LayerFit]
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "layers": {name: asdict(fit) for name, fit in self.layers.items()},
        }

    def __str__(self) -> str:
        """One line per layer."""
        width = max([len("layer"), *map(len, self.layers)])
        lines = [
            f"relative output error on {self.tokens:,} tokens, initialised from weights and data",
            f"{'layer':<{width}}  weights    data",
        ]
        for name, fit in self.layers.items():
            cells = (_shown(error) for error in (fit.weights_error, fit.data_error))
            lines.append(f"{name:<{width}}  {'  '.join(cells)}  {fit.kept or ''}".rstrip())
        return "\n".join(lines)


def _shown(error: float | None) -> str:
    return " " * 7 if error is None else f"{error:7.4f}"
