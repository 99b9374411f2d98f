"""Metrics of texts that a model writes: how often they are right to the letter, and how many words are wrong."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the fraction of texts that are the reference to the letter, spaces at the ends aside.

    Example:
        >>> exact_match(["a b ", "a"], ["a b", "A"])
        0.5
    """
    same = sum(found.strip() == wanted.strip() for found, wanted in zip(predictions, references, strict=True))
    return same / len(references)


def wer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the word error rate: words to insert, delete or replace, over all words of the references.

    Words are what stands between spaces; where these are phonemes, it is the phoneme error rate. It can be above 1.

    Example:
        >>> wer(["a x c", "d"], ["a b c", "d e"])
        0.4

    Source: Levenshtein 1966; as `jiwer` and `evaluate`'s "wer" compute it, over the whole corpus.
    """
    pairs = [(found.split(), wanted.split()) for found, wanted in zip(predictions, references, strict=True)]
    words = sum(len(wanted) for _, wanted in pairs)
    return sum(_edits(found, wanted) for found, wanted in pairs) / max(1, words)


def _edits(found: Sequence[str], wanted: Sequence[str]) -> int:
    """Return the least number of insertions, deletions and replacements between two sequences."""
    row = list(range(len(wanted) + 1))
    for i, word in enumerate(found, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(wanted, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]
