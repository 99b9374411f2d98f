"""How often each token occurs in a corpus.

Tokenizing 100 MB takes minutes, and a corpus has far fewer different words than words. Where a tokenizer treats the words
of a sequence independently, each different one is tokenized once. Whether it does is found out by comparing both ways on
the first sequences; if they differ, all is tokenized as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..errors import RecipeError
from ..utils.text import shorten
from .tokenizer import plain

Counts = np.ndarray[Any, np.dtype[np.int64]]

BATCH = 2_000_000
"""Characters that are read at once."""

WORDS = 400_000
"""Different words that are collected before they are tokenized."""

_SAMPLE = 200
_SPACES = re.compile(r"\s\s|\A\s|\s\Z")
_BORDER = re.compile(r"(?<=\S) (?=\S)")
_SPACE_INSIDE = re.compile(r"[^\s\u2581\u0120\u010a\u0109\u010d][\u2581\u0120 ]")
"""A space behind something else, in tokens of SentencePiece and of bytes: such tokens cross the borders of words."""


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Occurrences of tokens in a corpus.

    Attributes:
        tokens: how often each id occurs.
        examples: number of sequences.
        characters: in all of them.
        by_words: whether each different word was tokenized once.
    """

    tokens: Counts
    examples: int
    characters: int
    by_words: bool

    @property
    def total(self) -> int:
        """Number of tokens."""
        return int(self.tokens.sum())


def batches(corpus: Iterable[str], name: str = "texts") -> Iterator[list[str]]:
    """Yield the sequences of a corpus in lists of about `BATCH` characters, with a progress bar.

    Raises:
        RecipeError: for anything but strings.
    """
    if isinstance(corpus, str):
        raise RecipeError(f"`{name}` must be a list of strings, got one string: {shorten(corpus)}")
    batch: list[str] = []
    size = 0
    length = len(corpus) if hasattr(corpus, "__len__") else None
    with tqdm(total=length, desc=f"Tokenizing {name}", unit=" sequences", unit_scale=True) as bar:
        for index, sequence in enumerate(corpus):
            if not isinstance(sequence, str):
                raise RecipeError(f"`{name}` must be strings, got {shorten(sequence)} at position {index}")
            batch.append(sequence)
            size += len(sequence)
            if size >= BATCH:
                yield batch
                bar.update(len(batch))
                batch, size = [], 0
        if batch:
            yield batch
            bar.update(len(batch))


def count_tokens(backend: Any, corpus: Iterable[str], size: int, tokens: Iterable[str] = ()) -> TokenCounts:
    """Count the tokens of a corpus, without special tokens around its sequences.

    Args:
        backend: `tokenizers.Tokenizer`.
        corpus: sequences; read once.
        size: number of ids.
        tokens: the tokens of the vocabulary.

    Raises:
        RecipeError: for anything but strings.
    """
    total = np.zeros(size, np.int64)
    examples = characters = 0
    prefix: str | None = None
    heads: Counter[str] = Counter()
    words: Counter[str] = Counter()
    crossing = any(_SPACE_INSIDE.search(token) for token in tokens)
    with plain(backend):
        for number, batch in enumerate(batches(corpus)):
            if number == 0 and not crossing:
                prefix = _word_prefix(backend, batch[:_SAMPLE], size)
            examples += len(batch)
            characters += sum(map(len, batch))
            if prefix is None:
                total += _counted(backend, batch, None, size)
                continue
            for sequence in batch:
                first, *rest = _words(sequence)
                heads[first] += 1
                words.update(rest)
            if len(words) + len(heads) > WORDS:
                total += _counted_words(backend, heads, words, prefix, size)
        if prefix is not None:
            total += _counted_words(backend, heads, words, prefix, size)
    return TokenCounts(total, examples, characters, prefix is not None)


def _words(sequence: str) -> list[str]:
    """Split at single spaces between other characters, which every pre-tokenizer takes as a border or none does."""
    return _BORDER.split(sequence) if _SPACES.search(sequence) else sequence.split(" ")


def _word_prefix(backend: Any, sample: Sequence[str], size: int) -> str | None:
    """Return what a word must have in front to be tokenized as inside a sequence; None = words are not independent."""
    whole = _counted(backend, sample, None, size)
    for prefix in (" ", ""):
        heads: Counter[str] = Counter()
        words: Counter[str] = Counter()
        for sequence in sample:
            first, *rest = _words(sequence)
            heads[first] += 1
            words.update(rest)
        if np.array_equal(whole, _counted_words(backend, heads, words, prefix, size)):
            return prefix
    return None


def _counted_words(backend: Any, heads: Counter[str], words: Counter[str], prefix: str, size: int) -> Counts:
    """Count the tokens of the collected words, and forget them."""
    found = _counted(backend, list(heads), list(heads.values()), size)
    found += _counted(backend, [prefix + word for word in words], list(words.values()), size)
    heads.clear()
    words.clear()
    return found


def _counted(backend: Any, sequences: Sequence[str], times: Sequence[int] | None, size: int) -> Counts:
    encoded = [found.ids for found in backend.encode_batch_fast(list(sequences), add_special_tokens=False)]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ids = np.fromiter((token for found in encoded for token in found), np.int64, int(lengths.sum()))
    if times is None:
        return np.bincount(ids, minlength=size)
    weights = np.repeat(np.asarray(times, np.float64), lengths)  # exact up to 2**53
    return np.bincount(ids, weights, minlength=size).astype(np.int64)
