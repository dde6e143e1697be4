"""More training rows by replacing words (Jiao et al. 2020, TinyBERT, Algorithm 1)."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import datasets
from torch import Tensor, nn

from kronbert.distill.checks import MLM_HEADS
from kronbert.distill.data import TaskData
from kronbert.distill.text import ROWS_AT_ONCE
from kronbert.distill.unlabelled import text_table
from kronbert.distill.word_candidates import MaskedWords, Neighbours, Vocabulary
from kronbert.errors import DataError

# Letters alone: not mp3, not the halves of don't; both halves of well-known.
_WORD = re.compile(r"(?<![\w'’])[^\W\d_]+(?![\w'’])")

STOP_WORDS = frozenset(
    """a about above after again against all am an and any are as at be because been before being
    below between both but by can could did do does doing down during each few for from further had
    has have having he her here hers herself him himself his how i if in into is it its itself just
    me more most my myself no nor not now of off on once only or other our ours ourselves out over
    own same she should so some such than that the their theirs them themselves then there these
    they this those through to too under until up very was we were what when where which while who
    whom why will with would you your yours yourself yourselves""".split()
)
"""English words that are left alone: replacing them changes the grammar, not the content."""

Spans = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """One text, the places of its words, and for every copy the words that are to change, each
    with a number in [0, 1) that picks the candidate."""

    text: str
    spans: Spans
    changes: list[dict[int, float]]

    def places(self) -> list[int]:
        """Words that change in any copy."""
        return sorted({place for change in self.changes for place in change})


def augment(
    data: TaskData,
    tokenizer: object,
    source: nn.Module | Tensor,
    *,
    copies: int,
    p: float = 0.4,
    candidates: int = 15,
    seed: int = 0,
    stop_words: Collection[str] = STOP_WORDS,
) -> datasets.Dataset:
    """Rows with words of ``data.train`` replaced, without labels: for `with_unlabelled`.

    source: where the candidates of a word come from. A masked-LM model of ``tokenizer`` predicts
    them for a word of one piece, from the sentence with that word masked; for other words, and for
    a model without such a head, they are the nearest in its table of word embeddings by the cosine
    (the mean of the pieces stands for a word of several). A tensor (pieces, width) is that table.
    copies: changed rows per row, at most: those without a change, or equal to another, are left
    out. p: the chance of every word to be replaced, by any of the ``candidates`` best. Every text
    of a row is changed on its own. stop_words, numbers and words with a digit or an apostrophe
    stay. The same rows whatever ``data`` holds beside a row, for one seed. Reads ``data.train``
    in chunks; the rows of the result are held as packed strings. The model runs where it lies, in
    eval mode, one masked sentence for every word that changes: with a GPU for large sets."""
    if copies < 1 or not 0 < p <= 1 or candidates < 1:
        raise DataError(
            f"augment(copies={copies}, p={p}, candidates={candidates}): expected 1 copy or more, "
            "a chance in (0, 1] and 1 candidate or more."
        )
    columns = data.task.text
    if missing := set(columns) - set(data.train.column_names):
        raise DataError(
            f"augment: no column {', '.join(sorted(missing))}: the rows are tokenised. Augment "
            "before tokenize."
        )
    vocabulary = Vocabulary(tokenizer)
    table = source if isinstance(source, Tensor) else _table_of(source)
    near = Neighbours(vocabulary, table, candidates)
    masked = None
    if isinstance(source, nn.Module) and type(source).__name__ in MLM_HEADS:
        masked = MaskedWords(vocabulary, source, candidates)

    def rows() -> Iterator[tuple[str, ...]]:
        for start in range(0, len(data.train), ROWS_AT_ONCE):
            batch = data.train[start : start + ROWS_AT_ONCE]
            texts = list(zip(*(batch[name] for name in columns), strict=True))
            draws = [
                [_draw(text, f"{seed} {start + i} {column}", copies, p, stop_words)
                 for column, text in enumerate(row)]
                for i, row in enumerate(texts)
            ]  # fmt: skip
            found = _found([draw for row in draws for draw in row], vocabulary, near, masked)
            for row in draws:
                seen = {tuple(draw.text for draw in row)}
                for copy in range(copies):
                    new = tuple(_changed(draw, copy, found) for draw in row)
                    if new not in seen:
                        seen.add(new)
                        yield new

    table_of_rows = text_table(data.task, rows())
    if not len(table_of_rows):
        raise DataError(
            "augment: no word of the training rows can be replaced: is this the model's tokenizer?"
        )
    return table_of_rows


Candidates = dict[tuple[int, int], list[str]]
"""(id of a draw, place of a word in it) -> the words that may stand there."""


def _draw(text: str, seed: str, copies: int, p: float, stop_words: Collection[str]) -> _Draw:
    spans = [m.span() for m in _WORD.finditer(text)]
    spans = [(i, j) for i, j in spans if text[i:j].lower() not in stop_words]
    draw = random.Random(seed)
    changes = [
        {place: draw.random() for place in range(len(spans)) if draw.random() < p}
        for _ in range(copies)
    ]
    return _Draw(text=text, spans=spans, changes=changes)


def _found(
    draws: list[_Draw], vocabulary: Vocabulary, near: Neighbours, masked: MaskedWords | None
) -> Candidates:
    """Candidates for every word that changes; one pass over the model, one over the table."""
    wanted = [(draw, place) for draw in draws for place in draw.places()]
    words = [draw.text[slice(*draw.spans[place])] for draw, place in wanted]
    single = vocabulary.single(words) if masked is not None else set()
    neighbours = near.find({word for word in words if word not in single})
    found = {
        (id(draw), place): neighbours.get(word, [])
        for (draw, place), word in zip(wanted, words, strict=True)
    }
    if masked is not None:
        chosen = [pair for pair, word in zip(wanted, words, strict=True) if word in single]
        predicted = masked.find([(draw.text, draw.spans[place]) for draw, place in chosen])
        for (draw, place), options in zip(chosen, predicted, strict=True):
            found[id(draw), place] = options
    return found


def _changed(draw: _Draw, copy: int, found: Candidates) -> str:
    parts, end = [], 0
    for place, choice in sorted(draw.changes[copy].items()):
        options = found[id(draw), place]
        if not options:
            continue
        start, stop = draw.spans[place]
        word, new = draw.text[start:stop], options[int(choice * len(options))]
        if word[0].isupper() and new.islower():
            new = new.capitalize()
        parts += [draw.text[end:start], new]
        end = stop
    return "".join([*parts, draw.text[end:]])


def _table_of(model: nn.Module) -> Tensor:
    """Word embeddings (pieces, width) of a model, dense or Kronecker."""
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(get() if get is not None else None, "weight", None)
    if not isinstance(weight, Tensor):
        raise DataError(
            f"augment: {type(model).__name__} has no table of word embeddings: pass a transformers "
            "model or a tensor (pieces, width)."
        )
    return weight.detach()
