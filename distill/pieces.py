"""Batches of general text in pieces of several lengths: a student of full blocks alone knows little
of short sentences."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kronbert.errors import DistillError

Collator = Callable[[list[dict[str, Any]]], Any]


class Pieces:
    """A collator that cuts a batch of packed blocks into pieces of one length, drawn per batch.

    rows: n dicts with input_ids (block) as `text.pack_text` makes them -> what ``collator`` makes
    of n * block / length dicts with input_ids and attention_mask (length). A piece's first and last
    token become ``[CLS]`` and ``[SEP]``, so a step reads as many tokens at any length. The draw
    follows from the batch: a resumed run cuts as the interrupted one would have."""

    def __init__(self, collator: Collator, lengths: Sequence[int], tokenizer: Any) -> None:
        self.collator, self.lengths = collator, tuple(lengths)
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        ids = np.array([row["input_ids"] for row in rows], dtype=np.int64)
        length = random.Random(int(ids.sum())).choice(self.lengths)
        if ids.shape[1] % length:
            raise DistillError(
                f"Pieces: blocks of {ids.shape[1]} tokens are not whole pieces of {length}. Pack "
                "them to the stage's max_length."
            )
        parts = ids.reshape(-1, length).copy()
        if self.cls is not None and self.sep is not None:
            parts[:, 0], parts[:, -1] = self.cls, self.sep
        ones = [1] * length
        cut = [{"input_ids": part, "attention_mask": ones} for part in parts.tolist()]
        return self.collator(cut)


class BatchMasks:
    """A collator whose random masks follow from the batch: a resumed run masks the words that the
    interrupted one would have, however many batches were collated ahead."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        ids = (token for row in rows for token in row["input_ids"])
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: `torch.manual_seed` would reseed every GPU for good.
            torch.default_generator.manual_seed(
                sum(place * int(token) for place, token in enumerate(ids, start=1))
            )
            return self.collator(rows)


def check_pieces(where: str, lengths: Sequence[int], block: int) -> None:
    """Raise `DistillError` unless every length is at least 3 and divides ``block``."""
    for length in lengths:
        if type(length) is not int or length < 3 or block % length:
            raise DistillError(
                f"{where}: pieces={tuple(lengths)!r}: expected lengths of 3 tokens or more that "
                f"divide max_length={block}. Take {block} and halves of it."
            )
