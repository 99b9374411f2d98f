"""WordPiece (BERT): the longest token that a word begins with, then the longest that the rest begins with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from .base import JSON, KINDS, TokenizerKind


@KINDS.register("WordPiece")
class WordPiece(TokenizerKind):
    """Greedy longest match. Tokens need no others: a longest match stays the longest when others are removed.

    Words with a character that no token has become the unknown token, before and after.

    Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 4.1; Devlin et al. 2019.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__(model)
        self.ids = model["vocab"]
        self.prefix: str = model["continuing_subword_prefix"]

    def required(self) -> set[int]:
        return self.known([self.model["unk_token"]])

    def characters(self) -> set[int]:
        return {token for text, token in self.ids.items() if len(self._body(text)[0]) == 1}

    def parts(self, token: int) -> Iterable[int]:
        return ()

    def trimmed(self, new_id: Callable[[int], int | None]) -> JSON:
        return {**self.model, "vocab": self.trimmed_ids(new_id)}

    def caveat(self, special: Collection[int]) -> str | None:
        """Name the characters that have no token of their own: the words in which they get lost are not the same."""
        inside: set[tuple[str, bool]] = set()
        alone: set[tuple[str, bool]] = set()
        for text, token in self.ids.items():
            body, continues = self._body(text)
            if token not in special and text != self.model["unk_token"]:
                found = {(character, continues or index > 0) for index, character in enumerate(body)}
                (alone if len(body) == 1 else inside).update(found)
        lost = {character for character, continues in inside - alone if continues}
        if not lost:
            return None
        listed = ", ".join(repr(character) for character in sorted(lost)[:5])
        return (
            f"{len(lost)} characters ({listed}{', ...' if len(lost) > 5 else ''}) have no '{self.prefix}' token of "
            "their own: words that became unknown because of them may become pieces of other tokens"
        )

    def _body(self, text: str) -> tuple[str, bool]:
        """Return a token without its prefix, and whether it continues a word."""
        continues = text.startswith(self.prefix) and len(text) > len(self.prefix)
        return (text[len(self.prefix) :] if continues else text), continues
