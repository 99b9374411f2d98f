"""How often each token occurs in a corpus.

Tokenizing 100 MB takes minutes, and a corpus has far fewer different words than words. Where a tokenizer treats the
words of a sequence independently, each different one is tokenized once. Whether it does is found out by comparing both
ways on the first sequences; if they differ, all is tokenized as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
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

DIFFERENT = 0.3
"""Largest fraction of different words among those of a batch for which counting words pays."""

CROSSING = 16
"""Most tokens with a space inside; with a few, the sequences that contain them are tokenized as they are."""

_SAMPLE = 200
_MARKS = _HEAD, _END, _SPACE = "\0", "\1", "\2"
"""Characters that mark the start and the end of a sequence, and spaces inside words."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_RUN = re.compile(r"\s\s+")
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
        RecipeError: for anything but strings, and strings that UTF-8 cannot encode.
    """
    if isinstance(corpus, str):
        raise RecipeError(f"`{name}` must be a list of strings, got one string: {shorten(corpus)}")
    batch: list[str] = []
    size = 0
    length = len(corpus) if isinstance(corpus, Sized) else None
    with tqdm(total=length, desc=f"Tokenizing {name}", unit=" sequences", unit_scale=True, delay=1.0) as bar:
        for index, sequence in enumerate(corpus):
            if not isinstance(sequence, str):
                raise RecipeError(f"`{name}` must be strings, got {shorten(sequence)} at position {index}")
            if not sequence.isascii() and _LONE_SURROGATE.search(sequence):
                raise RecipeError(
                    f"`{name}` must be Unicode that UTF-8 can encode, got half of a surrogate pair in the sequence at "
                    f"position {index}: read the corpus with errors='replace'"
                )
            batch.append(sequence)
            size += len(sequence)
            if size >= BATCH:
                yield batch
                bar.update(len(batch))
                batch, size = [], 0
        if batch:
            yield batch
            bar.update(len(batch))


def count_tokens(backend: Any, corpus: Iterable[str], size: int, tokens: Mapping[str, int]) -> TokenCounts:
    """Count the tokens of a corpus, without special tokens around its sequences.

    Args:
        backend: `tokenizers.Tokenizer`.
        corpus: sequences; read once.
        size: number of ids.
        tokens: id of each token.

    Raises:
        RecipeError: for anything but strings.
    """
    words = _Words(backend, size, tokens)
    examples = characters = 0
    with plain(backend):
        for batch in batches(corpus):
            words.add(batch)
            examples += len(batch)
            characters += sum(map(len, batch))
        words.flush()
    return TokenCounts(words.counts, examples, characters, bool(words.prefix is not None))


class _Words:
    """The words of a corpus that are not tokenized yet, and the counts of those that are.

    Attributes:
        prefix: what a word must have in front to be tokenized as inside a sequence; None = words are not independent.
    """

    def __init__(self, backend: Any, size: int, tokens: Mapping[str, int]) -> None:
        self.backend, self.size = backend, size
        self.counts: Counts = np.zeros(size, np.int64)
        self.prefix: str | None = None
        self._started = False
        crossing = [token for text, token in tokens.items() if _SPACE_INSIDE.search(text)][: CROSSING + 1]
        self._crossing = [backend.decode([token], skip_special_tokens=False).strip() for token in crossing]
        self._seen: Counter[str] = Counter()

    def add(self, batch: Sequence[str]) -> None:
        """Take the sequences of a batch."""
        if not self._started:
            self._started = True
            if len(self._crossing) <= CROSSING:
                self.prefix = self._find_prefix(batch[:_SAMPLE])
        if self.prefix is None:
            self.counts += _counted(self.backend, batch, None, self.size)
            return
        joined = "".join(batch)
        if unsafe := [text for text in (*_MARKS, *self._crossing) if text in joined]:
            whole = [sequence for sequence in batch if any(text in sequence for text in unsafe)]
            self.counts += _counted(self.backend, whole, None, self.size)
            batch = [sequence for sequence in batch if not any(text in sequence for text in unsafe)]
        words = _words(batch)
        self._seen.update(words)
        if len(self._seen) > max(WORDS, DIFFERENT * len(words)):
            self.flush()
        elif len(self._seen) > DIFFERENT * len(words) and len(words) > WORDS // 4:
            self.flush()  # too few words come again: source code, for example
            self.prefix = None

    def flush(self) -> None:
        """Count the collected words."""
        if self.prefix is not None:
            self.counts += self._counted(self.prefix)

    def _counted(self, prefix: str) -> Counts:
        words = [word[1:] if word[:1] == _HEAD else prefix + word for word in self._seen]
        found = _counted(self.backend, [word.replace(_SPACE, " ") for word in words], self._seen.values(), self.size)
        self._seen.clear()
        return found

    def _find_prefix(self, sample: Sequence[str]) -> str | None:
        whole = _counted(self.backend, sample, None, self.size)
        for prefix in (" ", ""):
            self._seen.update(_words(sample))
            if np.array_equal(whole, self._counted(prefix)):
                return prefix
        return None


def _words(batch: Sequence[str]) -> list[str]:
    """Split sequences at single spaces between other characters, which are borders for a pre-tokenizer or are not.

    Returns:
        Words, those at the start of a sequence with `_HEAD` in front; spaces that do not count as borders are `_SPACE`.
    """
    joined = _HEAD + f"{_END}{_HEAD}".join(batch) + _END
    joined = _RUN.sub(lambda run: run[0].replace(" ", _SPACE), joined)
    joined = joined.replace(f"{_HEAD} ", _HEAD + _SPACE).replace(f" {_END}", _SPACE + _END)
    return joined[:-1].replace(_END, " ").split(" ")


def _counted(backend: Any, sequences: Sequence[str], times: Collection[int] | None, size: int) -> Counts:
    encoded = [found.ids for found in backend.encode_batch_fast(list(sequences), add_special_tokens=False)]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ids = np.fromiter((token for found in encoded for token in found), np.int64, int(lengths.sum()))
    if times is None:
        return np.bincount(ids, minlength=size)
    weights = np.repeat(np.fromiter(times, np.float64, len(times)), lengths)  # exact up to 2**53
    return np.bincount(ids, weights, minlength=size).astype(np.int64)
