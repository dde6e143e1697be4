"""Task batches of few different lengths: memory and prepared products serve the next batch too."""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorWithPadding


class FewLengths:
    """A collator that pads a batch to its longest row, rounded up by `few_lengths`.

    Rows of 1 to 128 tokens make batches of 128 lengths. On a CPU every one of them leaves gaps of
    other sizes in freed memory, and has oneDNN prepare its bf16 products anew: after 150 steps of
    32 rows of 35 to 128 tokens a student of MiniLM holds 2.5 GB instead of 3.9 by few, at the same
    speed (bf16, one thread of an AMD EPYC). Late in a run on STS-B glibc had
    19 % of the time, in one by few lengths, of another student, 9 (perf)."""

    def __init__(self, tokenizer: Any, longest: int) -> None:
        self.tokenizer, self.longest = tokenizer, longest

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        tokens = max(len(row["input_ids"]) for row in rows)
        length = max(tokens, min(few_lengths(tokens), self.longest))
        collate = DataCollatorWithPadding(self.tokenizer, padding="max_length", max_length=length)
        return collate(rows)


def few_lengths(tokens: int) -> int:
    """``tokens`` rounded up to one of eight lengths between a power of two and the next, an eighth
    longer at most: 1, 2, ... 16, 18, ... 32, 36, ... 64, 72, ... 128."""
    step = 1 << max(0, (tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step
