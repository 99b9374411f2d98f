"""Names in a recipe -> classes. Unknown names list the known ones; nothing here imports a path or evaluates text."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from .errors import RecipeError

T = TypeVar("T")

Spec = str | Mapping[str, Any]
"""A part of a recipe: a name, or ``{"name": ..., option: value}``."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return what ends the sentence that refuses a word: ``; did you mean 'x'?`` for the closest known one, or a stop.

    Example:
        >>> nearest("scoer", ["scorer", "pattern"]), nearest("zzz", ["scorer", "pattern"])
        ("; did you mean 'scorer'?", '.')
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `RecipeError` for the first key that is not known, naming the nearest one that is."""
    known = list(known)
    for key in given:
        if key not in known:
            raise RecipeError(f"{where} has no key '{key}'{nearest(str(key), known)} Known keys: {', '.join(known)}.")


class Registry(Generic[T]):
    """The entries of one kind (scorer, pattern, ...), each a dataclass whose fields are its options.

    Args:
        kind: the word for one entry in error messages, as in "unknown scorer 'x'".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}
        self._shorthands: list[tuple[re.Pattern[str], Callable[[re.Match[str]], dict[str, Any]]]] = []
        self._examples: list[str] = []

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that files the class under `name`, which is also set as its `name`."""

        def file(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            cls.name = name  # type: ignore[attr-defined]
            self._entries[name] = cls
            return cls

        return file

    def shorthand(self, regex: str, expand: Callable[[re.Match[str]], dict[str, Any]], example: str = "") -> None:
        """Let a bare name that matches `regex` in full stand for the options `expand` returns ("2:4" for n:m).

        Args:
            example: for the message about an unknown name.
        """
        self._shorthands.append((re.compile(regex), expand))
        self._examples += [example] if example else []

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._entries:
            known = sorted(self._entries)
            short = f"; for short as in {' or '.join(self._examples)}" if self._examples else ""
            raise RecipeError(f"unknown {self.kind} '{name}'{nearest(name, known)} Known: {', '.join(known)}{short}.")
        return self._entries[name]

    def resolve(self, spec: Spec) -> tuple[type[T], dict[str, Any]]:
        """Return the class and the options that a spec names, with every key checked.

        Raises:
            RecipeError: for an unknown name or option, or a spec that is neither a name nor a mapping.
        """
        name = spec.get("name") if isinstance(spec, Mapping) else spec
        for regex, expand in self._shorthands:
            if isinstance(name, str) and (match := regex.fullmatch(name)):
                # {"name": "2:4"} is what "2:4" is; options beside it replace those that it stands for.
                options, beside = expand(match), spec if isinstance(spec, Mapping) else {}
                return self.resolve({**options, **beside, "name": options["name"]})
        if isinstance(spec, str):
            return self[spec], {}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise RecipeError(f"a {self.kind} must be a name or {{'name': ..., options}}, got {spec!r}")
        cls = self[spec["name"]]
        options = {key: value for key, value in spec.items() if key != "name"}
        known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        check_keys(options, known, f"{self.kind} '{spec['name']}'")
        return cls, options

    def build(self, spec: Spec) -> T:
        """Make the entry that a spec names.

        Raises:
            RecipeError: for an unknown name or option, or an option the entry refuses.
        """
        cls, options = self.resolve(spec)
        try:
            return cls(**options)
        except RecipeError as error:
            if str(error).startswith("`"):  # an option alone, which does not say of what
                stated = spec if isinstance(spec, str) else cls.name  # type: ignore[attr-defined]
                raise type(error)(f"{self.kind} '{stated}': {error}") from None
            raise
        except TypeError as error:
            raise RecipeError(f"{self.kind} '{cls.name}': {error}") from error  # type: ignore[attr-defined]
