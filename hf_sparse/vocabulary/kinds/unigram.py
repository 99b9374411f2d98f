"""Unigram (T5, XLM-R, ALBERT): the most likely sequence of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .base import BYTES, JSON, KINDS, TokenizerKind


@KINDS.register("Unigram")
class Unigram(TokenizerKind):
    """The path of the highest score. Tokens need no others: with fewer paths, the best one stays the best.

    The score of an unknown character is 10 below the lowest of the vocabulary, so one token with that lowest score
    stays: otherwise paths through unknown characters would be weighed anew.

    Source: Kudo 2018, "Subword Regularization", section 3.1; the constant is that of SentencePiece and `tokenizers`.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__(model)
        self.ids = {text: index for index, (text, _) in enumerate(model["vocab"])}

    def required(self) -> set[int]:
        vocab, unknown = self.model["vocab"], self.model["unk_id"]
        lowest = min(range(len(vocab)), key=lambda index: vocab[index][1])
        return {lowest} | ({unknown} if unknown is not None else set()) | self._bytes()

    def characters(self) -> set[int]:
        return {token for text, token in self.ids.items() if len(text) == 1}

    def parts(self, token: int) -> Iterable[int]:
        return ()

    def trimmed(self, new_id: Callable[[int], int | None]) -> JSON:
        kept = [entry for index, entry in enumerate(self.model["vocab"]) if new_id(index) is not None]
        unknown = self.model["unk_id"]
        return {**self.model, "vocab": kept, "unk_id": None if unknown is None else new_id(unknown)}

    def _bytes(self) -> set[int]:
        return self.known(BYTES) if self.model.get("byte_fallback") else set()
