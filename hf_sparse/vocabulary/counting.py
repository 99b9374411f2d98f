"""How often each token occurs in a corpus.

Tokenizing 100 MB takes minutes, and a corpus has far fewer different words than words. Where a tokenizer treats the
words of a sequence independently, each different one is tokenized once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..errors import RecipeError
from ..utils.text import shorten
from .borders import Borders, find_borders
from .tokenizer import plain
from .words import HEAD, SPACE, Counts, Words, token_counts

BATCH = 2_000_000
"""Characters that are read at once."""

_SAMPLE = 200
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Occurrences of tokens in a corpus.

    Attributes:
        tokens: how often each id occurs.
        examples: number of sequences.
        characters: in all of them.
        whole: why each sequence was tokenized as it is, and not each different word once; None = it was not.
        words: different words that were tokenized.
    """

    tokens: Counts
    examples: int
    characters: int
    whole: str | None
    words: int

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
    if not isinstance(corpus, Iterable):
        raise RecipeError(f"`{name}` must be a list of strings, or another iterable of them, got {shorten(corpus)}")
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


def count_tokens(backend: Any, corpus: Iterable[str], size: int, data: Mapping[str, Any]) -> TokenCounts:
    """Count the tokens of a corpus, without special tokens around its sequences.

    Args:
        backend: `tokenizers.Tokenizer`.
        corpus: sequences; read once.
        size: number of ids.
        data: content of its tokenizer.json.

    Raises:
        RecipeError: for anything but strings.
    """
    examples = characters = 0
    borders = find_borders(data)
    with plain(backend), Words(backend, size) as words:
        for batch in batches(corpus):
            if not examples and borders.reason is None and not _is_same(backend, size, batch[:_SAMPLE], borders.unsafe):
                borders = Borders("the first sequences are tokenized in another way when they are cut")
            _add(words, batch, borders)
            examples += len(batch)
            characters += sum(map(len, batch))
    return TokenCounts(words.counts, examples, characters, borders.reason, words.different)


def _add(words: Words, batch: Sequence[str], borders: Borders) -> None:
    if borders.reason is not None:
        words.add_whole(batch)
        return
    joined = "".join(batch)
    if unsafe := [text for text in (HEAD, SPACE, *borders.unsafe) if text in joined]:
        whole = [any(text in sequence for text in unsafe) for sequence in batch]
        words.add_whole([sequence for sequence, uncut in zip(batch, whole, strict=True) if uncut])
        batch = [sequence for sequence, uncut in zip(batch, whole, strict=True) if not uncut]
    words.add(batch)


def _is_same(backend: Any, size: int, sample: Sequence[str], unsafe: tuple[str, ...]) -> bool:
    """Return whether both ways give the same counts."""
    with Words(backend, size) as words:
        _add(words, sample, Borders(unsafe=unsafe))
    return np.array_equal(words.counts, token_counts(backend, sample, size))
