"""kronbert: transformer encoders 8 to 20 times smaller, as sums of Kronecker products."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hf_hook import install as _install_checkpoint_format

if TYPE_CHECKING:
    from .checkpoint import load as load
    from .config import KroneckerConfig as KroneckerConfig
    from .config import Rule as Rule
    from .conversion import convert as convert
    from .conversion import merge as merge
    from .conversion import plan as plan
    from .decompose import nearest_kronecker as nearest_kronecker
    from .depth import fewer_layers as fewer_layers
    from .embedding import KroneckerEmbedding as KroneckerEmbedding
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import DistillError as DistillError
    from .errors import KronbertError as KronbertError
    from .errors import NoMatchError as NoMatchError
    from .errors import PlanError as PlanError
    from .errors import ReportError as ReportError
    from .errors import ShapeError as ShapeError
    from .fusion import FusionReport as FusionReport
    from .fusion import fuse as fuse
    from .fusion import fused as fused
    from .fusion import unfuse as unfuse
    from .head import KroneckerLMHead as KroneckerLMHead
    from .linear import KroneckerLinear as KroneckerLinear
    from .losses import mlm_loss as mlm_loss
    from .planning import Plan as Plan
    from .reporting import Report as Report
    from .reporting import report as report
    from .shapes import KroneckerShape as KroneckerShape
    from .shipped import list_students as list_students
    from .shipped import shipped_path as shipped_path

__version__ = "0.1.0"

_HOME = {
    "load": "checkpoint",
    "KroneckerConfig": "config",
    "Rule": "config",
    "convert": "conversion",
    "merge": "conversion",
    "plan": "conversion",
    "nearest_kronecker": "decompose",
    "fewer_layers": "depth",
    "KroneckerEmbedding": "embedding",
    "CheckpointError": "errors",
    "DataError": "errors",
    "DistillError": "errors",
    "KronbertError": "errors",
    "NoMatchError": "errors",
    "PlanError": "errors",
    "ReportError": "errors",
    "ShapeError": "errors",
    "FusionReport": "fusion",
    "fuse": "fusion",
    "fused": "fusion",
    "unfuse": "fusion",
    "KroneckerLMHead": "head",
    "KroneckerLinear": "linear",
    "mlm_loss": "losses",
    "Plan": "planning",
    "Report": "reporting",
    "report": "reporting",
    "KroneckerShape": "shapes",
    "list_students": "shipped",
    "shipped_path": "shipped",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Public names are loaded on first use: importing kronbert costs next to nothing."""
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kronbert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_install_checkpoint_format()
