"""How layers are named in a config: shell globs, or `target_modules` and `exclude_modules` as PEFT spells them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..errors import RecipeError
from ..utils.text import shorten

ALL_LINEAR = "all-linear"
MAX_REGEX = 1000
"""Characters of a regular expression."""

_NESTED = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")
"""A repeated group that repeats something itself: such an expression can take exponential time, and a config may come
from a file of others."""


@dataclasses.dataclass(frozen=True)
class ModuleNames:
    r"""The value of `target_modules` or `exclude_modules`, with the meaning it has in PEFT.

    Args:
        value: a regular expression that has to match a whole name; or names, each of which matches modules of this name
            and modules whose name ends with it after a dot; or "all-linear", all linear layers outside the task head.

    Raises:
        RecipeError: for any other value, and for a regular expression that is not one, is longer than 1,000 characters,
            or repeats a group with a repetition in it.

    Example:
        >>> names = ModuleNames(("query", "output.dense"))
        >>> [names.matches(name) for name in ("bert.layer.0.query", "layer.1.output.dense", "intermediate.dense")]
        [True, True, False]
        >>> ModuleNames(r".*\.layer\.[01]\..*").matches("bert.layer.1.query")
        True
    """

    value: str | tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.value, str):
            if not self.value or not all(isinstance(name, str) and name for name in self.value):
                raise RecipeError(f"names of modules must be a list of non-empty strings, got {shorten(self.value)}")
            return
        if len(self.value) > MAX_REGEX or _NESTED.search(self.value):
            raise RecipeError(
                f"a regular expression for modules must have at most {MAX_REGEX} characters and no repeated group with "
                f"a repetition in it, got {shorten(self.value)}"
            )
        try:
            re.compile(self.value)
        except re.error as error:
            raise RecipeError(
                f"{shorten(self.value)} is not a regular expression: {error}. Shell globs go under `targets` and "
                "`exclude`"
            ) from None

    @classmethod
    def of(cls, value: Any, key: str) -> ModuleNames | None:
        """Return what a config states under `target_modules` or `exclude_modules`, None for None."""
        if value is None or isinstance(value, ModuleNames):
            return value
        if isinstance(value, Mapping) or not isinstance(value, (str, list, tuple, set, frozenset)):
            raise RecipeError(
                f"`{key}` must be a regular expression, a list of names or 'all-linear', got {shorten(value)}"
            )
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        return cls(value if isinstance(value, str) else tuple(value))

    @property
    def is_all_linear(self) -> bool:
        """Whether it is "all-linear", in upper or lower case."""
        return isinstance(self.value, str) and self.value.lower() == ALL_LINEAR

    def matches(self, name: str) -> bool:
        """Return whether a module of this name is meant; for "all-linear" all are, and the caller leaves out heads."""
        if self.is_all_linear:
            return True
        if isinstance(self.value, str):
            return re.fullmatch(self.value, name) is not None
        return any(name == suffix or name.endswith(f".{suffix}") for suffix in self.value)

    def plain(self) -> str | list[str]:
        """Return the value in plain JSON types."""
        return self.value if isinstance(self.value, str) else list(self.value)

    def __str__(self) -> str:
        return self.value if isinstance(self.value, str) else ", ".join(self.value)


NamePattern = str | ModuleNames
"""A shell glob, or what PEFT would call target modules."""


def matches(name: str, pattern: NamePattern) -> bool:
    """Return whether a pattern means the module of this name; a glob may also be one over the name of its weight.

    Example:
        >>> matches("encoder.layer.0.query", "*.query"), matches("encoder.layer.0.query", "*.query.weight")
        (True, True)
    """
    if isinstance(pattern, ModuleNames):
        return pattern.matches(name)
    return fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)


def entries(patterns: Iterable[NamePattern], key: str) -> Iterator[tuple[NamePattern, str]]:
    """Yield each glob, regular expression or name of a list, which has to match something, and its name in a message.

    Args:
        key: "targets" or "exclude".

    Example:
        >>> [said for _, said in entries(("*.query", ModuleNames(("key", "value"))), "targets")]
        ["`targets` '*.query'", "`target_modules` 'key'", "`target_modules` 'value'"]
    """
    for pattern in patterns:
        if not isinstance(pattern, ModuleNames):
            yield pattern, f"`{key}` '{pattern}'"
            continue
        for name in (pattern.value,) if isinstance(pattern.value, str) else pattern.value:
            single = pattern if isinstance(pattern.value, str) else ModuleNames((name,))
            yield single, f"`{key.removesuffix('s')}_modules` '{name}'"
