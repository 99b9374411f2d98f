"""What a smaller vocabulary does to sequences that did not decide what is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

from .counting import batches
from .tokenizer import plain


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Tokens of held-out sequences, before and after.

    Attributes:
        examples: number of sequences.
        words: separated by white space.
        tokens, tokens_after: in all sequences.
        covered: tokens that stay as they are.
        changed: sequences with a token that does not.
        changed_tokens, changed_tokens_after: in those sequences.
        unknown, unknown_after: unknown tokens in all sequences.
    """

    examples: int = 0
    words: int = 0
    tokens: int = 0
    tokens_after: int = 0
    covered: int = 0
    changed: int = 0
    changed_tokens: int = 0
    changed_tokens_after: int = 0
    unknown: int = 0
    unknown_after: int = 0

    @property
    def fertility(self) -> tuple[float, float]:
        """Tokens per word, before and after."""
        words = max(self.words, 1)
        return self.tokens / words, self.tokens_after / words

    @property
    def coverage(self) -> float:
        """Fraction of the tokens that stay as they are."""
        return self.covered / self.tokens if self.tokens else 1.0

    @property
    def growth(self) -> float:
        """Length of the changed sequences after, relative to before."""
        return self.changed_tokens_after / self.changed_tokens if self.changed_tokens else 1.0


def measure(
    before: Any, after: Any, corpus: Iterable[str], kept: Collection[int], unknown: tuple[int | None, int | None]
) -> HeldOut:
    """Tokenize sequences with both vocabularies.

    Args:
        before, after: `tokenizers.Tokenizer`.
        kept: ids of `before` that stay.
        unknown: id of the unknown token, before and after.

    Raises:
        RecipeError: for anything but strings.
    """
    total = dict.fromkeys([field.name for field in dataclasses.fields(HeldOut)], 0)
    with plain(before), plain(after):
        for batch in batches(corpus, "held_out"):
            both = [
                [e.ids for e in side.encode_batch_fast(batch, add_special_tokens=False)] for side in (before, after)
            ]
            total["examples"] += len(batch)
            total["words"] += sum(len(sequence.split()) for sequence in batch)
            for old, new in zip(*both, strict=True):
                covered = sum(token in kept for token in old)
                total["tokens"] += len(old)
                total["tokens_after"] += len(new)
                total["covered"] += covered
                total["unknown"] += old.count(unknown[0])
                total["unknown_after"] += new.count(unknown[1])
                if covered < len(old):
                    total["changed"] += 1
                    total["changed_tokens"] += len(old)
                    total["changed_tokens_after"] += len(new)
    return HeldOut(**total)
