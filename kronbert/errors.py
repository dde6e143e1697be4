"""The errors kronbert raises: each says where, what was expected and what to do."""

from __future__ import annotations


class KronbertError(ValueError):
    """Base of every error raised on purpose; a `ValueError`, so callers may catch either."""


class ShapeError(KronbertError):
    """Sizes that do not fit together: one that does not divide, an input of the wrong width."""


class PlanError(KronbertError):
    """A request no plan can meet: a factor out of reach, an unknown preset, a second conversion."""


class NoMatchError(PlanError):
    """A module name or pattern that matches nothing in the model."""


class CheckpointError(KronbertError):
    """A saved model that cannot be read as it stands: missing, extra or misshapen tensors."""


class DataError(KronbertError):
    """A data set that cannot be used: a missing column, an unknown label, no rows."""


class DistillError(KronbertError):
    """A student, teacher and objective that do not go together."""


class ReportError(KronbertError):
    """A model that cannot be measured as asked, or a report that cannot be written or read."""


def expect_model(call: str, model: object) -> None:
    """Raise `PlanError` for what is no module: a name, a state_dict, a class."""
    if isinstance(model, type) or not hasattr(model, "named_modules"):
        raise PlanError(
            f"{call}: expected a model (nn.Module), got {model!r:.60}. For a hub name or a folder: "
            "AutoModel.from_pretrained(name), of transformers."
        )


def near(name: str, known: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """The sentence that lists what ``name`` may have been meant to be."""
    import difflib

    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.4)
    if close:
        return "Nearest: " + ", ".join(repr(c) for c in close) + "."
    shown = ", ".join(repr(k) for k in list(known)[:12])
    return f"Known: {shown}{', ...' if len(known) > 12 else ''}."
