"""Running text as rows of one sentence each, for students of sentence encoders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from kronbert.distill.text import ROWS_AT_ONCE
from kronbert.errors import DataError, DistillError

# A full stop with what it closes, before what begins as a sentence does. Abbreviations cut some
# sentences short.
_END = re.compile(r"([.!?][\"')\]]*)\s+(?=[\"'(\[]?[A-Z0-9])")

MODULES = "modules.json"
"""Where sentence-transformers lists what follows an encoder."""

POOLING = "1_Pooling/config.json"
"""Where it says how token states become one embedding, unless `MODULES` names another folder."""


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, in order; nothing but the blanks between them is left out."""
    paragraph, start, found = paragraph.strip(), 0, []
    for end in _END.finditer(paragraph):
        found.append(paragraph[start : end.end(1)])
        start = end.end()
    return [*found, paragraph[start:]]


def sentence_rows(
    text: datasets.Dataset,
    tokenizer: Any,
    max_length: int = 128,
    *,
    words: tuple[int, int] = (4, 64),
) -> datasets.Dataset:
    """The sentences of ``text`` (column text, one paragraph a row) as rows of tokens: input_ids and
    attention_mask, cut at ``max_length``, of their own lengths.

    words: fewest and most between blanks; other sentences are left out."""
    few, most = words

    def found() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(text), ROWS_AT_ONCE):
            paragraphs = text[start : start + ROWS_AT_ONCE]["text"]
            each = (sentence for paragraph in paragraphs for sentence in split_sentences(paragraph))
            kept = [sentence for sentence in each if few <= len(sentence.split()) <= most]
            if not kept:
                continue
            rows = tokenizer(kept, truncation=True, max_length=max_length)
            columns = [
                pa.array(rows["input_ids"], pa.list_(pa.int32())),
                pa.array(rows["attention_mask"], pa.list_(pa.int8())),
            ]
            yield pa.record_batch(columns, names=["input_ids", "attention_mask"])

    batches = list(found())
    if not batches:
        raise DataError(f"the text has no sentence of {few} to {most} words: give more of it.")
    return datasets.Dataset(InMemoryTable(pa.Table.from_batches(batches)))


def check_pooling(model: str) -> None:
    """Raise `DistillError` where a sentence encoder takes something else than the mean over its
    tokens' last hidden states. Nothing is known of a model without `POOLING`."""
    listed = _file_of(model, MODULES)
    modules = json.loads(listed.read_text()) if listed else []
    places = [one["path"] for one in modules if str(one.get("type")).endswith("Pooling")]
    place = f"{places[0]}/config.json" if places else POOLING
    path = _file_of(model, place)
    if path is None:
        return
    told = json.loads(path.read_text())
    ways = [key for key, value in told.items() if key.startswith("pooling_mode") and value is True]
    way = told.get("pooling_mode") or " and ".join(ways)
    if way not in ("mean", "pooling_mode_mean_tokens"):
        raise DistillError(
            f"{model}: its sentence embedding is {way or 'unknown'} ({place}); the term "
            "'sentence' compares means over tokens. Leave sentences out: hidden states are learnt "
            "all the same."
        )


def _file_of(model: str, name: str) -> Path | None:
    """A file of the model's folder or repository; None where it has none."""
    from transformers.utils import cached_file

    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(str(cached_file(model, name)))
    except (OSError, ValueError):
        return None
