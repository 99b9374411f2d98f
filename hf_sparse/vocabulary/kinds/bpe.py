"""Byte-pair encoding, of bytes (GPT-2, Qwen) or of characters with byte fallback (Gemma, Llama 2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .base import BYTES, JSON, KINDS, TokenizerKind

Pair = tuple[str, str]


@KINDS.register("BPE")
class BPE(TokenizerKind):
    """Merge the pair of the lowest rank, again and again.

    A token is made by merges, and a merge that it needs is kept with both of its parts, down to the characters. No
    merge of a word crosses the borders of its final tokens, so inside one of them the merges are those of that token
    alone: replaying it tells the last merge, whose parts are tokens that are needed (`parts`). Merges of removed tokens
    are removed; those that are left keep their order, so each step takes the same pair as before.

    Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__(model)
        self.ids = model["vocab"]
        self.prefix: str = model.get("continuing_subword_prefix") or ""
        self.suffix: str = model.get("end_of_word_suffix") or ""
        self.merges: list[Pair] = [_pair(merge) for merge in model["merges"]]
        self._made = [self._joined(pair) for pair in self.merges] if self.prefix else list(map("".join, self.merges))
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}  # of a pair listed twice, the last counts
        self._makers: dict[str, list[Pair]] = {}
        for pair, text in zip(self.merges, self._made, strict=True):
            self._makers.setdefault(text, []).append(pair)
        self._texts = {token: text for text, token in self.ids.items()}

    def required(self) -> set[int]:
        fallback = BYTES if self.model.get("byte_fallback") else ()
        return self.known([self.model.get("unk_token"), *fallback])

    def characters(self) -> set[int]:
        return {token for text, token in self.ids.items() if len(self._symbols(text)) == 1}

    def parts(self, token: int) -> Iterable[int]:
        text = self._texts.get(token)
        makers = self._makers.get(text, ()) if text is not None else ()
        if text is None or not makers:
            return ()
        if len(makers) > 1:
            last = self._last_merge(text)
            makers = makers if last is None else [last]
        return self.known(part for pair in makers for part in pair)

    def trimmed(self, new_id: Callable[[int], int | None]) -> JSON:
        kept = self.trimmed_ids(new_id)
        merges = [
            list(pair)
            for pair, text in zip(self.merges, self._made, strict=True)
            if text in kept and pair[0] in kept and pair[1] in kept
        ]
        return {**self.model, "vocab": kept, "merges": merges}

    def _joined(self, pair: Pair) -> str:
        return pair[0] + (pair[1].removeprefix(self.prefix) if self.prefix else pair[1])

    def _symbols(self, text: str) -> list[str]:
        """Return what merging a token begins with: its characters, with the marks of the tokenizer."""
        inner, last = text, ""
        if self.suffix and text.endswith(self.suffix) and len(text) > len(self.suffix):
            inner, last = text[: -len(self.suffix)], self.suffix
        first = ""
        if self.prefix and inner.startswith(self.prefix) and len(inner) > len(self.prefix):
            first, inner = self.prefix, inner[len(self.prefix) :]
        symbols = [(self.prefix if index else first) + character for index, character in enumerate(inner)]
        return [*symbols[:-1], symbols[-1] + last] if symbols else []

    def _last_merge(self, text: str) -> Pair | None:
        """Return the last merge by which a token is made; None if merging its characters does not make it."""
        symbols, ranks, none = self._symbols(text), self._ranks, len(self.merges)
        while len(symbols) > 2:
            found = [ranks.get(pair, none) for pair in itertools.pairwise(symbols)]
            rank = min(found)
            if rank == none:
                return None
            index = found.index(rank)
            symbols[index : index + 2] = [self._joined((symbols[index], symbols[index + 1]))]
        pair = (symbols[0], symbols[1]) if len(symbols) == 2 else None
        return pair if pair in ranks else None


def _pair(merge: str | Iterable[str]) -> Pair:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second
