"""The order in which a stage reads its rows: from a seed alone, in batches of like lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class SeededSampler(Sampler[int]):
    """A random order of the rows, in batches of like lengths where lengths are given.

    transformers' grouping sorts 50 batches at a time by length, longest first, and leaves them so.
    A student of sentences drifts with the lengths then, and is worst on all after the short ones;
    one of a task was not worse for it. mixed: the batches are shuffled, but for the first one, the
    longest of all, so that memory runs out at once or not at all, and the last, which may be
    smaller."""

    def __init__(
        self,
        rows: int,
        lengths: Sequence[int] | None,
        batch_size: int,
        seed: Callable[[], int],
        *,
        mixed: bool = False,
    ) -> None:
        self.rows, self.lengths, self.batch_size, self.seed = rows, lengths, batch_size, seed
        self.mixed = mixed

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed())
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        if not self.mixed:
            return iter(order)
        size = self.batch_size
        first, *middle = (order[start : start + size] for start in range(0, self.rows, size))
        last = middle.pop() if middle else []
        places = torch.randperm(len(middle), generator=generator).tolist()
        return iter([*first, *(row for place in places for row in middle[place]), *last])
