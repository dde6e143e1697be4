"""The house style that a machine can hold us to: docstrings, lengths, names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = [
    path
    for folder in ("kronbert", "kernels", "distill")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.resolve() == path  # not a second time through a link
]
LONGEST = 400
# Names of roles, not of subjects: whatever has no place ends up there.
NO_SUBJECT = {"base", "common", "core", "helper", "helpers", "misc", "util", "utils"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_file_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{named(path)}: no docstring on top"
    first = docstring.split("\n\n")[0]
    assert first.endswith((".", "?", ":")), f"{named(path)}: the docstring starts with no sentence"


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_file_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{named(path)}: {lines} lines, {LONGEST} at most; split it by subject"


def test_every_file_has_a_subject():
    tests = (ROOT / "tests").rglob("*.py")
    assert [named(p) for p in [*LIBRARY, *tests] if p.stem in NO_SUBJECT] == []


def test_types_are_shipped():
    assert (ROOT / "kronbert" / "py.typed").is_file()


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "The kronbert authors" in text
