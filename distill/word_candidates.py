"""What may stand for a word: its neighbours in an embedding table, or a masked-LM's predictions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronbert.distill.taps import Captured
from kronbert.errors import DataError

_LETTERS = re.compile(r"[^\W\d_]{2,}")
# 1,024 words against 30,000 of 384 numbers: 120 MB of products at once.
WORDS_AT_ONCE = 1024
# About 2,000 tokens, whose logits over 30,000 pieces take 250 MB.
CHARACTERS_AT_ONCE = 8192


class Vocabulary:
    """The whole words among a tokenizer's pieces: letters only, two at least.

    ids (words,) ascending; words: their texts. A piece that goes on a word (``##s``) is none, nor
    is one that the tokenizer does not give back for its own text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        texts = {}
        for index in sorted(set(tokenizer.get_vocab().values()) - special):
            text = tokenizer.convert_tokens_to_string(
                [tokenizer.convert_ids_to_tokens(index)]
            ).strip()
            if _LETTERS.fullmatch(text):
                texts[index] = text
        pieces = self.pieces(list(texts.values()))
        self.words: dict[int, str] = {
            index: text
            for (index, text), found in zip(texts.items(), pieces, strict=True)
            if found == [index]
        }
        if not self.words:
            raise DataError(
                f"{type(tokenizer).__name__}: no piece of its vocabulary is a whole word of "
                "letters, so no word can be replaced."
            )
        self.ids = torch.tensor(list(self.words))

    def pieces(self, words: list[str]) -> list[list[int]]:
        """Ids of every word as it stands inside a sentence, without special tokens."""
        if not words:
            return []
        # With a blank: byte-level vocabularies have other pieces for the start of a text.
        given = [f" {word}" for word in words]
        found: list[list[int]] = self.tokenizer(given, add_special_tokens=False)["input_ids"]
        return found

    def single(self, words: Iterable[str]) -> set[str]:
        """Those of one piece that the vocabulary knows."""
        unique = sorted(set(words))
        unknown = self.tokenizer.unk_token_id
        pairs = zip(unique, self.pieces(unique), strict=True)
        return {word for word, ids in pairs if len(ids) == 1 and ids[0] != unknown}


class Neighbours:
    """The nearest whole words by the cosine of their embeddings; found once per word.

    table (pieces, width)."""

    def __init__(self, vocabulary: Vocabulary, table: Tensor, count: int) -> None:
        if table.dim() != 2 or len(table) < len(vocabulary.tokenizer):
            raise DataError(
                f"augment: a table {tuple(table.shape)} for a tokenizer of "
                f"{len(vocabulary.tokenizer)} pieces: expected one row per piece. Take the table "
                "of a model with this tokenizer."
            )
        self.vocabulary, self.count = vocabulary, count
        unit = table.float() / table.float().norm(dim=1, keepdim=True).clamp(min=1e-12)
        self.unit = unit
        self.whole = unit[vocabulary.ids.to(unit.device)]
        self.known: dict[str, list[str]] = {}

    def find(self, words: Collection[str]) -> dict[str, list[str]]:
        """Every word's nearest others, nearest first; none for a word with an unknown piece."""
        new = sorted(set(words) - self.known.keys())
        unknown = self.vocabulary.tokenizer.unk_token_id
        asked = []
        for word, pieces in zip(new, self.vocabulary.pieces(new), strict=True):
            self.known[word] = []
            if pieces and unknown not in pieces:
                asked.append((word, pieces))
        for start in range(0, len(asked), WORDS_AT_ONCE):
            chunk = asked[start : start + WORDS_AT_ONCE]
            means = torch.stack([self.unit[pieces].mean(0) for _, pieces in chunk])
            best = (means @ self.whole.T).topk(min(self.count + 2, len(self.whole))).indices
            for (word, _), places in zip(chunk, best.tolist(), strict=True):
                ids = self.vocabulary.ids[places].tolist()
                self.known[word] = others(word, [self.vocabulary.words[i] for i in ids], self.count)
        return {word: self.known[word] for word in words}


class MaskedWords:
    """A masked-LM's whole words for a place in a sentence, likeliest first."""

    def __init__(self, vocabulary: Vocabulary, model: nn.Module, count: int) -> None:
        self.vocabulary, self.model, self.count = vocabulary, model, count
        self.mask = vocabulary.tokenizer.mask_token
        if self.mask is None:
            raise DataError(
                f"augment: {type(vocabulary.tokenizer).__name__} has no mask token, which a "
                "masked-LM needs. Pass the model's table of word embeddings instead."
            )

    @torch.inference_mode()
    def find(self, places: Sequence[tuple[str, tuple[int, int]]]) -> list[list[str]]:
        """For every (sentence, place of a word in it) the words that may stand there; none where
        the sentence is cut off before that word."""
        found: list[list[str]] = [[] for _ in places]
        order = sorted(range(len(places)), key=lambda i: len(places[i][0]))
        was_training = self.model.training
        self.model.eval()
        try:
            start = len(order)
            while start:  # longest first: what follows takes no more memory
                longest = len(places[order[start - 1]][0])
                end, start = start, max(0, start - max(1, CHARACTERS_AT_ONCE // longest))
                picked = order[start:end]
                options = self._batch([places[i] for i in picked])
                for i, words in zip(picked, options, strict=True):
                    found[i] = words
        finally:
            self.model.train(was_training)
        return found

    def _batch(self, places: Sequence[tuple[str, tuple[int, int]]]) -> list[list[str]]:
        texts = [text[:i] + str(self.mask) + text[j:] for text, (i, j) in places]
        tokenizer = self.vocabulary.tokenizer
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        batch = batch.to(next(self.model.parameters()).device)
        rows, at = (batch["input_ids"] == tokenizer.mask_token_id).nonzero(as_tuple=True)
        logits = Captured(outputs=self.model(**batch)).logits[rows, at]
        logits = logits[:, self.vocabulary.ids.to(rows.device)]
        best = logits.topk(min(self.count + 2, logits.shape[1])).indices.tolist()
        found: list[list[str]] = [[] for _ in places]
        for row, likeliest in zip(rows.tolist(), best, strict=True):
            text, (i, j) = places[row]
            ids = self.vocabulary.ids[likeliest].tolist()
            found[row] = others(text[i:j], [self.vocabulary.words[n] for n in ids], self.count)
        return found


def others(word: str, found: Iterable[str], count: int) -> list[str]:
    """The first ``count`` that are not the word itself, in whatever case."""
    same = word.lower()
    return [other for other in found if other.lower() != same][:count]
