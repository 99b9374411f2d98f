"""Which tokens stay: those that must, those that are requested, and the most frequent ones."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import regex

from ..errors import RecipeError
from ..registry import nearest
from ..utils.text import shorten
from ..utils.validation import check_bool, check_number, check_positive_int, is_integer
from .kinds import TokenizerKind
from .words import Counts

CURVE = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99995, 0.99999, 1.0)
"""Coverages at which the size of the vocabulary is recorded."""


@dataclasses.dataclass(frozen=True)
class Criteria:
    """What is to be kept.

    Args:
        coverage: fraction of the token occurrences in the corpus that stay as they are, in (0, 1].
        min_count: keep tokens that occur at least this often, in place of a coverage.
        keep: tokens that stay whatever their count, as in `tokenizer.get_vocab()`, or their ids.
        scripts: Unicode scripts, such as "Latin" or "Han": tokens written in them alone stay.
        keep_characters: keep every token of a single character, so that nothing becomes unknown that was not.
        pad_to_multiple_of: keep more of the most frequent tokens, until the rows are a multiple of this.

    Raises:
        RecipeError: for a value out of its range, or a coverage beside a count.
    """

    coverage: float | None = None
    min_count: int | None = None
    keep: Sequence[str | int] = ()
    scripts: Sequence[str] = ()
    keep_characters: bool = True
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.coverage is not None:
            check_number("coverage", self.coverage, "(0, 1]")
        if self.min_count is not None:
            check_positive_int("min_count", self.min_count)
        if self.coverage is not None and self.min_count is not None:
            raise RecipeError("`coverage` and `min_count` are two ways to choose the same tokens; give one of them")
        check_bool("keep_characters", self.keep_characters)
        if self.pad_to_multiple_of is not None:
            check_positive_int("pad_to_multiple_of", self.pad_to_multiple_of)
        for name in ("keep", "scripts"):
            if isinstance(getattr(self, name), str) or not isinstance(getattr(self, name), Sequence):
                raise RecipeError(f"`{name}` must be a list, got {shorten(getattr(self, name))}")

    def check_rows(self, rows: int) -> None:
        """Raise `RecipeError` for a multiple that no part of so many rows can have."""
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of > rows:
            raise RecipeError(
                f"`pad_to_multiple_of` must be at most {rows}, the rows of the embeddings, got "
                f"{self.pad_to_multiple_of}: trimming adds no rows"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments that are not at their default, in plain JSON types."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return {
            field.name: plain[field.name]
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }


class KeptTokens:
    """A growing set of tokens, always with the tokens that they need.

    Args:
        kind: tells what a token needs.
    """

    def __init__(self, kind: TokenizerKind) -> None:
        self.kind = kind
        self.ids: set[int] = set()

    def add(self, token: int) -> list[int]:
        """Keep a token, and return all that was not kept before."""
        added, waiting = [], [token]
        while waiting:
            token = waiting.pop()
            if token not in self.ids:
                self.ids.add(token)
                added.append(token)
                waiting.extend(self.kind.parts(token))
        return added

    def add_all(self, tokens: Iterable[int]) -> None:
        """Keep tokens."""
        for token in tokens:
            self.add(token)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The tokens that stay.

    Attributes:
        kept: their ids, in order.
        covered: occurrences of them in the corpus.
        curve: coverage, and the number of tokens that reach it.
        reasons: number of tokens by the first reason for which they stay.
    """

    kept: tuple[int, ...]
    covered: int
    curve: tuple[tuple[float, int], ...]
    reasons: Mapping[str, int]


def choose(
    kind: TokenizerKind,
    criteria: Criteria,
    counts: Counts,
    special: Iterable[int],
    requested: Iterable[int],
    rows: int,
) -> Choice:
    """Return the tokens that stay.

    Args:
        kind: the vocabulary.
        criteria: how many are kept of the tokens that need not be.
        counts: occurrences in the corpus by id.
        special: tokens with a role.
        requested: tokens to keep, from `keep` and `scripts`.
        rows: of the embeddings. Tokens behind them, which the model cannot read, stay as they are.
    """
    kept, reasons = KeptTokens(kind), {}
    groups: dict[str, Iterable[int]] = {
        "special and added tokens": sorted({*special, *range(rows, len(counts))}),
        "bytes and the unknown token": sorted(kind.required()),
        "single characters": sorted(kind.characters()) if criteria.keep_characters else (),
        "requested by name or script": sorted(requested),
    }
    for reason, tokens in groups.items():
        before = len(kept.ids)
        kept.add_all(tokens)
        reasons[reason] = len(kept.ids) - before
    before = len(kept.ids)
    order = [int(token) for token in np.lexsort((np.arange(len(counts)), -counts)) if counts[token] > 0]
    chosen, curve = _most_frequent(kept, criteria, counts, order)
    if criteria.pad_to_multiple_of is not None:
        _fill_rows(chosen, criteria.pad_to_multiple_of, rows, order)
    reasons["seen in the corpus, and the parts of such tokens"] = len(chosen.ids) - before
    ids = tuple(sorted(chosen.ids))
    return Choice(ids, int(counts[list(ids)].sum()), tuple(curve), reasons)


def _most_frequent(
    base: KeptTokens, criteria: Criteria, counts: Counts, order: Sequence[int]
) -> tuple[KeptTokens, list[tuple[float, int]]]:
    """Keep the most frequent tokens until the criterion is met; go on alone for the curve."""
    total = int(counts.sum())
    wanted = math.ceil((1.0 if criteria.coverage is None else criteria.coverage) * total - 1e-6)
    covered = int(counts[list(base.ids)].sum()) if base.ids else 0
    marks = [(coverage, math.ceil(coverage * total - 1e-6)) for coverage in CURVE]
    curve: list[tuple[float, int]] = []
    kept, chosen = base, None
    for token in (*order, None):
        while marks and covered >= marks[0][1] and total:
            curve.append((marks.pop(0)[0], len(kept.ids)))
        if chosen is None and (token is None or _is_enough(criteria, int(counts[token]), covered, wanted)):
            chosen = KeptTokens(base.kind)
            chosen.ids = set(kept.ids)
        if token is not None:
            covered += int(counts[kept.add(token)].sum()) if token not in kept.ids else 0
    assert chosen is not None
    return chosen, curve


def _is_enough(criteria: Criteria, count: int, covered: int, wanted: int) -> bool:
    return count < criteria.min_count if criteria.min_count is not None else covered >= wanted


def _fill_rows(kept: KeptTokens, multiple: int, rows: int, order: Sequence[int]) -> None:
    """Keep more tokens, the most frequent first, one at a time: those whose parts are all kept."""
    missing = -sum(token < rows for token in kept.ids) % multiple
    waiting = [token for token in (*order, *sorted(set(range(rows)) - set(order))) if token not in kept.ids]
    while missing and waiting:
        later = []
        for token in waiting:
            if missing and all(part in kept.ids for part in kept.kind.parts(token)):
                kept.add(token)
                missing -= 1
            else:
                later.append(token)
        if len(later) == len(waiting):
            return
        waiting = later


def requested_ids(ids: Mapping[str, int], keep: Iterable[str | int], size: int) -> set[int]:
    """Return the ids of tokens that are named, or given by id.

    Raises:
        RecipeError: for one that does not exist, naming the nearest.
    """
    found = set()
    for token in keep:
        if isinstance(token, str) and token in ids:
            found.add(ids[token])
        elif is_integer(token) and 0 <= token < size:
            found.add(token)
        elif isinstance(token, str):
            close = [known for known in ids if known.lower().strip("\u2581\u0120#") == token.lower().strip()]
            close = close or [known for known in ids if known[:2] == token[:2]][:2000]
            raise RecipeError(
                f"`keep` must list tokens of the vocabulary, got {shorten(token)}{nearest(token, close)} Words that "
                "are not tokens belong in the corpus"
            )
        else:
            raise RecipeError(f"`keep` must list tokens or ids below {size}, got {shorten(token)}")
    return found


def in_scripts(backend: Any, size: int, scripts: Sequence[str]) -> set[int]:
    """Return the tokens that are written in these scripts alone, with digits, punctuation and symbols of all scripts.

    Raises:
        RecipeError: for the name of a script that Unicode does not have.
    """
    if not scripts:
        return set()
    for script in scripts:
        try:
            if not isinstance(script, str) or not re.fullmatch(r"[A-Za-z_]+", script):
                raise regex.error("not a name")
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error as error:
            raise RecipeError(
                f"`scripts` must be names of Unicode scripts, such as Latin, Cyrillic or Han, got {shorten(script)}"
            ) from error
    classes = "".join(rf"\p{{Script={script}}}" for script in (*scripts, "Common", "Inherited"))
    written = regex.compile(rf"[{classes}]+")
    decoded = backend.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    return {token for token, text in enumerate(decoded) if "\ufffd" not in text and written.fullmatch(text)}
