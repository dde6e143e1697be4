"""Files to rows: tables (TSV, CSV, JSONL, parquet), and running text, packed into blocks."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from kronbert.errors import DataError, near

FORMATS = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")
PACKED = (".gz", ".xz")
FORMATS_IN_WORDS = ".tsv, .csv, .jsonl or .parquet, the first three also as .gz or .xz"
TEXT_FORMATS = (".txt", ".jsonl", ".ndjson", ".parquet")
LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; Python's own limit is 131,072."""

# Rows that are tokenised at once: 1,000 paragraphs keep the buffer below a few MB.
ROWS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class Table:
    """columns: name -> one value per row. lines: the line of the file that a row starts on."""

    path: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int] | None

    def where(self, row: int) -> str:
        place = f"line {self.lines[row]}" if self.lines else f"row {row + 1}"
        return f"{self.path}, {place}"

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, *names: str) -> str:
        """The first of ``names`` that the table has."""
        for name in names:
            if name in self.columns:
                return name
        raise DataError(
            f"{self.path}: no column {names[0]!r}. It has {', '.join(map(repr, self.columns))}. "
            f"{near(names[0], tuple(self.columns))} Rename one, or pass text=... / label=... ."
        )


def kind_of(path: Path) -> str:
    """The format's suffix below a packing suffix: ``.tsv`` for ``train.tsv.gz``."""
    name = path.name.lower()
    return Path(name.removesuffix(path.suffix.lower()) if path.suffix in PACKED else name).suffix


def read_bytes(path: Path) -> bytes:
    """The file's content, unpacked."""
    data = path.read_bytes()
    try:
        match path.suffix:
            case ".gz":
                return gzip.decompress(data)
            case ".xz":
                return lzma.decompress(data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: broken or cut off ({error}): copy or pack it again.") from error
    return data


def read_text(path: Path) -> str:
    """The file as UTF-8, without a byte order mark; an error names the line."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}). Convert the file, "
            "for instance with `iconv -f latin1 -t utf-8`."
        ) from error


def read_table(path: str | Path) -> Table:
    """One file as columns. TSV has no quoting (a quotation mark is a character like any other, and
    only ``\\n`` ends a line); CSV has it as in RFC 4180. Empty lines are skipped."""
    path = Path(path)
    kind = kind_of(path)
    if kind not in FORMATS or (kind == ".parquet" and path.suffix in PACKED):
        raise DataError(f"{path}: unknown format: expected {FORMATS_IN_WORDS}.")
    if kind == ".parquet":
        try:
            columns = pq.read_table(path).to_pydict()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not a parquet file ({error}): write it again.") from error
        table = Table(path=path, columns=columns, lines=None)
    elif kind in (".tsv", ".csv"):
        table = _delimited(path, _tsv_rows(path) if kind == ".tsv" else _csv_rows(path))
    else:
        table = _jsonl(path)
    if not len(table):
        raise DataError(f"{path}: no rows. Expected a header or keys, and one example per row.")
    return table


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    text = read_text(path)
    windows = text.partition("\n")[0].endswith("\r")
    if _quoted(text):
        warnings.warn(
            f"{path}: fields stand in quotation marks, doubled inside, as in CSV; .tsv has no "
            "quoting, so the marks are read as part of the text. If they are none of it, write it "
            "as .csv, or without quoting (pandas: quoting=csv.QUOTE_NONE).",
            stacklevel=2,
        )
    for number, line in enumerate(text.split("\n"), start=1):
        if windows:
            line = line.removesuffix("\r")
        if line:
            yield number, line.split("\t")


def _quoted(text: str) -> bool:
    """Whether every field that begins with a quotation mark is one of CSV, at least one of them for
    the marks inside it."""
    fields = re.findall(r'(?:^|(?<=[\t\n]))"[^\t\n]*', text)
    marked = [field.removesuffix("\r") for field in fields]
    inside = [field[1:-1] for field in marked if len(field) > 1 and field.endswith('"')]
    return (
        len(inside) == len(marked)
        and any('""' in one for one in inside)
        and not any('"' in one.replace('""', "") for one in inside)
    )


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    start, longest = 1, csv.field_size_limit(LONGEST_FIELD)
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: {error}. In CSV a field with a comma, line end or quotation "
            'mark stands in quotation marks, doubled inside ("a ""b"" c"); .tsv has no quoting.'
        ) from error
    finally:
        csv.field_size_limit(longest)


def _delimited(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Table:
    _, header = next(rows, (0, []))
    if len(set(header)) != len(header):
        raise DataError(f"{path}, line 1: two columns have one name: {header}. Rename one.")
    values, lines = [], []
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(row)} fields, but the header has {len(header)} "
                f"({', '.join(header)}). Complete the line or take it out."
            )
        values.append(row)
        lines.append(number)
    columns = {name: [row[i] for row in values] for i, name in enumerate(header)}
    return Table(path=path, columns=columns, lines=lines)


def _jsonl(path: Path) -> Table:
    rows, lines, names = [], [], dict[str, None]()
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object {{...}} on every line.")
        if "\\u" in line:
            _refuse_half_characters(row, f"{path}, line {number}")
        rows.append(row)
        lines.append(number)
        names.update(dict.fromkeys(row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(path=path, columns=columns, lines=lines)


def _refuse_half_characters(row: dict[str, Any], where: str) -> None:
    """JSON can hold half of a character beyond the first 65,536 (an emoji), UTF-8 cannot."""
    for name, value in row.items():
        try:
            f"{name}{value}".encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: column {name!r} holds half a character (a lone surrogate, as a text "
                "that was cut within an emoji). Cut it elsewhere, or remove that half: "
                "text.encode('utf-8', 'ignore').decode()."
            ) from None


def load_text(source: str | Path, *, limit_tokens: int | None = None) -> datasets.Dataset:
    """General text for stage 1, one column ``text``: paragraphs of a file, or rows of a hub set.

    source: .txt (one paragraph per line; .gz and .xz too), .jsonl or .parquet with a column
    ``text``; else a hub name, ``name`` or ``name:config``, whose train split is read.
    limit_tokens: stop after so many words (parts between blanks; English has about 1.3 word
    pieces per word). A hub set is then streamed, not downloaded whole.
    """
    if limit_tokens is not None and limit_tokens < 1:
        raise DataError(f"load_text(limit_tokens={limit_tokens}): expected words, 1 or more.")
    path = Path(source)
    if path.is_file():
        rows: Iterable[str] = _paragraphs(path)
    elif isinstance(source, Path) or kind_of(path) in TEXT_FORMATS or path.suffix in PACKED:
        raise DataError(f"{source}: no such file. Expected .txt, .jsonl, .parquet or a hub name.")
    else:
        rows = _hub_text(str(source), streaming=limit_tokens is not None)
    if limit_tokens is not None:
        rows = _first_words(rows, limit_tokens)
    rows = iter(rows)
    chunks = []
    while batch := list(islice(rows, 10 * ROWS_AT_ONCE)):
        chunks.append(pa.array(batch, pa.large_string()))
    if not chunks:
        raise DataError(f"{source}: no text in it. Expected one paragraph per line, or a row each.")
    table = pa.table({"text": pa.chunked_array(chunks)})
    return datasets.Dataset(InMemoryTable(table))


def _paragraphs(path: Path) -> Iterator[str]:
    kind = kind_of(path)
    if kind not in TEXT_FORMATS:
        raise DataError(f"{path}: unknown format: expected .txt, .jsonl or .parquet for text.")
    if kind == ".txt":
        yield from (line.strip() for line in read_text(path).split("\n") if line.strip())
        return
    table = read_table(path)
    for row, value in enumerate(table.columns[table.column("text")]):
        if not isinstance(value, str):
            raise DataError(f"{table.where(row)}: column 'text' is {value!r}: expected text.")
        if value.strip():
            yield value.strip()


def _hub_text(source: str, *, streaming: bool) -> Iterator[str]:
    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split="train", streaming=streaming)
    except Exception as error:  # the client raises its own, httpx's, OSError and ValueError
        raise DataError(
            f"text {source!r}: no such file, and not to be had from the Hugging Face hub "
            f"({error}). "
            "Without network, pass a .txt, .jsonl or .parquet file."
        ) from error
    names = tuple(loaded.column_names or ())
    if names and "text" not in names:
        raise DataError(
            f"text {source!r}: no column 'text'. It has {', '.join(map(repr, names))}: save the "
            "wanted column as a .jsonl file with the key 'text' and pass that."
        )
    texts = (row["text"] or "" for row in loaded)  # a row may hold no text
    yield from (text.strip() for text in texts if text.strip())


def _first_words(rows: Iterable[str], limit: int) -> Iterator[str]:
    for row in rows:
        words = row.split()
        if len(words) >= limit:
            yield " ".join(words[:limit])
            return
        limit -= len(words)
        yield row


def pack_text(text: datasets.Dataset, tokenizer: Any, block: int = 128) -> datasets.Dataset:
    """Blocks of exactly ``block`` tokens, ``[CLS] ... [SEP]``: input_ids and attention_mask.

    Paragraphs follow each other through the blocks, so every token stands in one block and in
    order; the rest at the end that fills no block is left out. A tokenizer without these two
    tokens (GPT-2's) packs text only. 4 bytes of memory per token.
    """
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    framed = cls is not None and sep is not None
    inner = block - 2 if framed else block
    if inner < 1 or block > tokenizer.model_max_length:
        raise DataError(
            f"pack_text(block={block}): expected 3 to {tokenizer.model_max_length} tokens."
        )
    blocks: list[np.ndarray] = []
    rest = np.empty(0, dtype=np.int32)
    for start in range(0, len(text), ROWS_AT_ONCE):
        rows = text[start : start + ROWS_AT_ONCE]["text"]
        ids = tokenizer(list(rows), add_special_tokens=False, verbose=False)["input_ids"]
        rest = np.concatenate([rest, *(np.asarray(row, dtype=np.int32) for row in ids)])
        full = len(rest) // inner * inner
        blocks.append(rest[:full].reshape(-1, inner))
        rest = rest[full:].copy()
    packed = np.concatenate(blocks) if blocks else np.empty((0, inner), dtype=np.int32)
    if not len(packed):
        raise DataError(
            f"pack_text: {len(rest)} tokens do not fill one block of {block}: give more text, or "
            "a smaller block."
        )
    if framed:
        packed = np.pad(packed, ((0, 0), (1, 1)))
        packed[:, 0], packed[:, -1] = cls, sep
    columns = {"input_ids": packed, "attention_mask": np.ones_like(packed, dtype=np.int8)}
    arrays = {k: pa.FixedSizeListArray.from_arrays(v.ravel(), block) for k, v in columns.items()}
    return datasets.Dataset(InMemoryTable(pa.table(arrays)))
