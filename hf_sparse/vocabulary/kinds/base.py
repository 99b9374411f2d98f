"""What a kind of tokenizer has to say about its vocabulary before some of it can be removed."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

from ...registry import Registry

JSON = dict[str, Any]
"""A part of tokenizer.json."""

BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))
"""The tokens that stand for single bytes where a tokenizer has `byte_fallback`."""


class TokenizerKind(abc.ABC):
    """The `model` part of tokenizer.json: its tokens, which of them need each other, and how it looks with fewer.

    A kind keeps this promise: let K be a set of tokens with `required()` in it, closed under `parts`. Then every string
    that the whole tokenizer splits into tokens of K alone is split in the same way by the one with the tokens of K.

    Args:
        model: that part, as `tokenizers` writes it.

    Attributes:
        name: value of `type` in the JSON, set by `KINDS.register`.
        ids: id of each token.
    """

    name: ClassVar[str]
    ids: Mapping[str, int]

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    @abc.abstractmethod
    def required(self) -> set[int]:
        """Return the tokens without which others would be split in another way: unknown, bytes."""

    @abc.abstractmethod
    def characters(self) -> set[int]:
        """Return the tokens of a single character, to which everything else falls back."""

    @abc.abstractmethod
    def parts(self, token: int) -> Iterable[int]:
        """Return the tokens that must be kept with a token."""

    @abc.abstractmethod
    def trimmed(self, new_id: Callable[[int], int | None]) -> JSON:
        """Return the model with the tokens that have a new id.

        Args:
            new_id: takes an id, returns the new one or None. It keeps the order.
        """

    def caveat(self, special: Collection[int]) -> str | None:
        """Return what the promise above does not cover for this very vocabulary; None = nothing.

        Args:
            special: added tokens, which are found in a sequence before this kind sees it.
        """
        return None

    def known(self, tokens: Iterable[str | None]) -> set[int]:
        """Return the ids of those of the tokens that exist."""
        return {self.ids[token] for token in tokens if token is not None and token in self.ids}

    def trimmed_ids(self, new_id: Callable[[int], int | None]) -> dict[str, int]:
        """Return the new id of each token that stays."""
        return {token: new for token, old in self.ids.items() if (new := new_id(old)) is not None}


KINDS: Registry[TokenizerKind] = Registry("tokenizer kind")
"""All kinds by the name that tokenizer.json has for them."""
