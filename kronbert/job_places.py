"""Whether two runs of a job were asked for the same: settings that name files or folders say less
by their text than by where it leads from the folder of the moment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .shipped import is_shipped_name

PLACES = ("model", "student", "task", "data_dir", "text", "valid", "stage1_text", "unlabelled")
"""Settings that may name a file or a folder; a hub name or a GLUE task otherwise."""


def places_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Of each of `PLACES` that names a file or folder here: where it lies, links followed."""
    from .distill.data import is_folder

    found = {}
    for key in PLACES:
        name = settings.get(key)
        if not isinstance(name, str) or is_shipped_name(name):
            continue
        if key == "task" and not is_folder(name):
            continue
        place = Path(name).expanduser()
        if place.exists():
            found[key] = str(place.resolve())
    return found


def changed_settings(
    before: Mapping[str, Any],
    asked: Mapping[str, Any],
    before_places: Mapping[str, str] | None,
    places: Mapping[str, str],
) -> list[str]:
    """What differs between two runs' settings, as "key before -> asked"; but for the output.

    before_places: None for a run from before places were kept; their texts are compared alone.
    The same text that leads elsewhere is another setting, unless the old place is gone: a project
    that was moved as a whole goes on."""
    found = []
    for key in sorted({*asked, *before} - {"output"}):
        old, new = before.get(key), asked.get(key)
        was, now = (before_places or {}).get(key), places.get(key)
        if before_places is None or was == now is None:
            same = old == new
        elif was == now:
            same = True
        else:
            same = old == new and was is not None and not Path(was).exists()
        if not same and old == new:
            old, new = was or old, now or f"no {new}"
        if not same:
            found.append(f"{key} {old!r} -> {new!r}")
    return found
