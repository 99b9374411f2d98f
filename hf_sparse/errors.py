"""Every error hf_sparse raises on purpose. A message says what was requested, what was found, where, and what to do."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""Characters that move the cursor, change the direction of the text, or cannot be encoded."""


def printable(text: str) -> str:
    r"""Return text with its control characters escaped: names from a file must not reach the terminal as commands.

    Line feeds and tabs stay. It is here, and not in `utils.text`, because every error message goes through it.

    Example:
        >>> print(printable("layer\x1b[2J.weight"))
        layer\x1b[2J.weight
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class SparsityError(Exception):
    """Base of all errors of hf_sparse: catch this one to catch them all."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RecipeError(SparsityError, ValueError):
    """A request is contradictory, unknown or cannot be reached by this run."""


ConfigError = RecipeError
"""The same under the name that Hugging Face users expect."""


class PatternError(RecipeError):
    """A pattern does not fit the shape of a weight."""


class CheckpointError(SparsityError, ValueError):
    """A file is corrupted, inconsistent, or from a version that this one cannot read."""


class BackendError(SparsityError, RuntimeError):
    """A kernel or a runtime cannot do what was requested on this machine."""


class HubError(SparsityError, RuntimeError):
    """The Hub refused something, or could not be reached."""
