"""Data files as the tests write them, packed where the name says so."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

SST2 = "sentence\tlabel\na fine film\t1\na dull film\t0\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".xz":
        raw = lzma.compress(raw)
    path.write_bytes(raw)
    return path


def folder(root: Path, train: str | bytes, dev: str | bytes | None = None, kind=".tsv") -> Path:
    write(root / f"train{kind}", train)
    write(root / f"dev{kind}", train if dev is None else dev)
    return root
