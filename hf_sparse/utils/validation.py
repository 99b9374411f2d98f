"""Checks of single values, with messages of one form: "`warmup` must be in [0, 1), got 2"."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from ..errors import RecipeError, SparsityError
from .text import shorten

Error = type[SparsityError]

_INTERVAL = re.compile(r"([\[(])([^,]+), ([^,]+)([\])])")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number: no bool, NaN or infinity, and no text that looks like one.

    Example:
        >>> [is_number(value) for value in (1, 0.5, True, float("nan"), 10**400, "1")]
        [True, True, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer may have any number of digits
        return False


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an int and not a bool.

    Example:
        >>> [is_integer(value) for value in (1, True, 1.0, "1")]
        [True, False, False, False]
    """
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: object, interval: str = "(-inf, inf)", error: Error = RecipeError) -> None:
    """Raise unless a value is a finite number in an interval.

    Args:
        name: of the option, for the message.
        interval: as it is written in mathematics: "[0, 1)" includes 0 and excludes 1.
        error: class of the exception.

    Example:
        >>> check_number("warmup", 2, "[0, 1)")
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `warmup` must be in [0, 1), got 2
        >>> check_number("warmup", "2", "[0, 1)")
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `warmup` must be a number in [0, 1), got '2'
    """
    if not is_number(value):
        raise error(f"`{name}` must be a{_within(interval, 'number')}, got {shorten(value)}")
    if not _contains(interval, value):
        raise error(f"`{name}` must be in {interval}, got {shorten(value)}")


def check_integer(name: str, value: object, interval: str = "(-inf, inf)", error: Error = RecipeError) -> None:
    """Raise unless a value is an integer in an interval, see `check_number`.

    Example:
        >>> check_integer("seed", 0.5, "[0, inf)")
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `seed` must be an integer in [0, inf), got 0.5
    """
    if not is_integer(value) or not _contains(interval, value):
        raise error(f"`{name}` must be an{_within(interval, 'integer')}, got {shorten(value)}")


def check_positive_int(name: str, value: object, error: Error = RecipeError) -> None:
    """Raise unless a value is an integer above 0.

    Example:
        >>> check_positive_int("every", 0)
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `every` must be a positive integer, got 0
    """
    if not is_integer(value) or value < 1:
        raise error(f"`{name}` must be a positive integer, got {shorten(value)}")


def check_bool(name: str, value: object, error: Error = RecipeError) -> None:
    """Raise unless a value is True or False.

    Example:
        >>> check_bool("normalize", "no")
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `normalize` must be true or false, got 'no'
    """
    if not isinstance(value, bool):
        raise error(f"`{name}` must be true or false, got {shorten(value)}")


def check_text(name: str, value: object, error: Error = RecipeError) -> None:
    """Raise unless a value is a non-empty string.

    Example:
        >>> check_text("revision", 5)
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `revision` must be a string, got 5
    """
    if not isinstance(value, str) or not value:
        raise error(f"`{name}` must be a{' non-empty' if value == '' else ''} string, got {shorten(value)}")


def check_mapping(name: str, value: object, error: Error = RecipeError) -> None:
    """Raise unless a value is a mapping.

    Example:
        >>> check_mapping("training", [1])
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `training` must be a mapping, got [1]
    """
    if not isinstance(value, Mapping):
        raise error(f"`{name}` must be a mapping, got {shorten(value)}")


def check_one_of(name: str, value: object, choices: Iterable[Any], error: Error = RecipeError) -> None:
    """Raise unless a value is one of several.

    Example:
        >>> check_one_of("format", "zip", ("packed", "dense"))
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `format` must be one of 'packed', 'dense', got 'zip'
    """
    choices = list(choices)
    if value not in choices:
        raise error(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {shorten(value)}")


def check_batches(batches: object, error: Error = RecipeError) -> None:
    """Raise an error if something is not batches for a model, as far as that shows without reading an iterator.

    Example:
        >>> check_batches([{"input_ids": [[1, 2]]}])
        >>> check_batches({"input_ids": [[1, 2]]})
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `batches` must be a list of mappings, the keyword arguments of the model, got ...
    """
    if isinstance(batches, Sequence) and not isinstance(batches, str):
        found = [f"a list with {type(batch).__name__}" for batch in batches if not isinstance(batch, Mapping)]
    else:
        single = isinstance(batches, (str, Mapping)) or hasattr(batches, "shape") or not isinstance(batches, Iterable)
        found = [type(batches).__name__] if single else []
    if found:
        raise error(
            f"`batches` must be a list of mappings, the keyword arguments of the model, got {found[0]}. Put a single "
            "batch into a list: [batch]"
        )


@functools.cache
def _bounds(interval: str) -> tuple[bool, float, float, bool]:
    match = _INTERVAL.fullmatch(interval)
    if match is None:
        raise ValueError(f"{interval!r} is not an interval such as '[0, 1)'")
    left, low, high, right = match.groups()
    return left == "[", float(low), float(high), right == "]"


def _contains(interval: str, value: float) -> bool:
    from_low, low, high, to_high = _bounds(interval)
    return (low <= value if from_low else low < value) and (value <= high if to_high else value < high)


def _within(interval: str, kind: str) -> str:
    _, low, high, _ = _bounds(interval)
    unbounded = low == -math.inf and high == math.inf
    return (
        f" finite {kind}" if unbounded and kind == "number" else f" {kind}" if unbounded else f" {kind} in {interval}"
    )
