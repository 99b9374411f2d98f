"""The words of a corpus, each different one tokenized once.

A corpus of 100 MB has some 20 million words, and a hundredth of that of different ones. Sequences are cut at the
borders that `borders` has proven to change nothing. Words that occur equally often are tokenized together, behind the
letter "a", which is subtracted again: so each is read as inside a sequence, and few objects are made.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import regex

from .borders import SPACE_MARK

Counts = np.ndarray[Any, np.dtype[np.int64]]

WORDS = 1_000_000
"""Different words that are collected before they are tokenized."""

TOGETHER = 200
"""Words of one count that are tokenized as one sequence."""

HEAD, SPACE = "\1", "\2"
"""Characters that mark the start of a sequence, and spaces that do not separate words."""

FIRST = "a"
"""A plain sequence, behind which words are tokenized."""

_UNKNOWN, _PLAIN, _OTHER, _MARK = range(4)
_NOT_PLAIN = regex.compile(r"[\s\p{C}\p{Z}\p{M}\p{Grapheme_Cluster_Break=Prepend}\u2581]")


def token_counts(backend: Any, sequences: Sequence[str], size: int, times: Sequence[int] | None = None) -> Counts:
    """Count the tokens of sequences.

    Args:
        backend: `tokenizers.Tokenizer`.
        size: number of ids.
        times: how often each sequence counts; None = once.
    """
    counts: Counts = np.zeros(size, np.int64)
    if not sequences:
        return counts
    encoded = [
        np.array(found.ids, np.int64) for found in backend.encode_batch_fast(sequences, add_special_tokens=False)
    ]
    ids = np.concatenate(encoded)
    if times is None:
        return np.bincount(ids, minlength=size)
    weights = np.repeat(np.array(times, np.float64), [len(part) for part in encoded])  # exact up to 2**53
    return np.bincount(ids, weights, minlength=size).astype(np.int64)


class Words:
    """The words of a corpus that are not tokenized yet, and the counts of those that are.

    Args:
        backend: `tokenizers.Tokenizer` without truncation and padding.
        size: number of ids.

    Attributes:
        counts: of the tokens; complete after the block.
        different: words that were tokenized.
    """

    def __init__(self, backend: Any, size: int) -> None:
        self.backend, self.size = backend, size
        self.counts: Counts = np.zeros(size, np.int64)
        self.different = 0
        self._classes = np.zeros(0x110000, np.uint8)
        self._classify(map(chr, range(0x80)))
        self._seen: Counter[str] = Counter()
        self._first = token_counts(backend, [FIRST], size)
        self._worker = ThreadPoolExecutor(1)  # `tokenizers` releases the GIL
        self._waiting: list[Future[Counts]] = []

    def add(self, batch: Sequence[str]) -> None:
        """Take sequences, in none of which the characters of this module's marks occur."""
        self._seen.update(self.split(batch))
        if len(self._seen) >= WORDS:
            self._flush()

    def add_whole(self, sequences: Sequence[str]) -> None:
        """Take sequences that may not be cut."""
        if sequences:
            self._collect(1)
            self._waiting.append(self._worker.submit(token_counts, self.backend, sequences, self.size))

    def __enter__(self) -> Words:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
            self._collect(0)
        self._worker.shutdown(cancel_futures=True)

    def split(self, batch: Sequence[str]) -> list[str]:
        """Return the words of sequences: those at a start have `HEAD` in front, spaces inside are `SPACE`."""
        joined = HEAD + f" {HEAD}".join(batch)
        narrow = joined.isascii()
        padded = (joined + SPACE * 2).encode("ascii" if narrow else "utf-32-le")
        codes = np.frombuffer(bytearray(padded), np.uint8 if narrow else np.uint32)
        spaces = np.flatnonzero(codes == ord(" "))
        left, right = codes[spaces - 1], codes[spaces + 1]
        if not narrow:
            self._classify_all(np.concatenate([left, right, behind := codes[spaces + 2]]))
        border = (self._classes[left] == _PLAIN) & (self._classes[right] == _PLAIN)
        if not narrow:
            border &= self._classes[behind] != _MARK
        border |= right == ord(HEAD)
        codes[spaces[~border]] = ord(SPACE)
        return codes[:-2].tobytes().decode("ascii" if narrow else "utf-32-le").split(" ")

    def _classify_all(self, codes: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
        if (unknown := codes[self._classes[codes] == _UNKNOWN]).size:
            self._classify(map(chr, np.unique(unknown).tolist()))

    def _classify(self, characters: Iterator[str]) -> None:
        """Find out which characters are plain: no space or mark, and nothing that the normalizer makes one of."""
        normalizer = self.backend.normalizer
        for character in characters:
            if unicodedata.category(character).startswith("M"):
                found = _MARK
            elif _NOT_PLAIN.match(character):
                found = _OTHER
            else:
                text = f"{FIRST}{character}{FIRST}"
                inner = text if normalizer is None else normalizer.normalize_str(text).lstrip(f" {SPACE_MARK}")
                ends = (inner[1:2] + inner[-2:-1]) if len(inner) > 2 else " "
                found = _OTHER if any(end in f" {SPACE_MARK}" for end in ends) else _PLAIN
            self._classes[ord(character)] = found

    def _flush(self) -> None:
        """Have the collected words tokenized, while others are collected."""
        seen, self._seen = self._seen, Counter()
        self.different += len(seen)
        self._collect(1)
        self._waiting.append(self._worker.submit(self._counted, seen))

    def _collect(self, most: int) -> None:
        """Wait until no more than so many tasks are waiting."""
        while len(self._waiting) > most:
            self.counts += self._waiting.pop(0).result()

    def _counted(self, seen: Counter[str]) -> Counts:
        alone: Counter[str] = Counter()
        behind: list[tuple[str, int]] = []
        same: dict[int, list[str]] = {}
        for word, count in seen.items():
            if word[0] == HEAD:
                alone[word[1:]] = count
            elif self._classes[ord(word[-1])] == _PLAIN:
                same.setdefault(count, []).append(word)
            else:  # the end of a sequence, where no border is
                behind.append((word, count))
        for count, words in same.items():
            starts = range(0, len(words), TOGETHER)
            behind.extend((" ".join(words[start : start + TOGETHER]), count) for start in starts)
        found = self._token_counts(list(alone), list(alone.values()))
        times = [count for _, count in behind]
        found += self._token_counts([f"{FIRST} {text}" for text, _ in behind], times)
        return found - self._first * sum(times)

    def _token_counts(self, sequences: Sequence[str], times: Sequence[int]) -> Counts:
        restored = [sequence.replace(SPACE, " ") for sequence in sequences]
        return token_counts(self.backend, restored, self.size, times)
