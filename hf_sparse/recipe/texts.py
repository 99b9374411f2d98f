"""Plain text for causal language models: one stream of tokens, cut into windows to evaluate on or to calibrate with."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import RecipeError
from ..utils.validation import check_integer, check_one_of, check_positive_int
from .data import read_rows
from .sections import FORMATS

Bos = Literal["auto", "always", "never"]
BOS: tuple[Bos, ...] = ("auto", "always", "never")
TEXT_SUFFIXES = (".txt", ".md")
SEPARATOR = "\n\n"
"""Between the examples of a file."""
_SAMPLE = "a"


def read_text(path: str | Path, column: str = "text") -> str:
    """Return the text of a file: a plain one as a whole, or all examples one after the other.

    Args:
        column: of a json, jsonl, csv, tsv or parquet file.

    Raises:
        RecipeError: if the file cannot be read, is empty, or has no such column.
    """
    path = Path(path)
    if path.suffix.lower() in FORMATS:
        text = SEPARATOR.join(read_rows(str(path), (column,))[column])
    elif path.suffix.lower() in TEXT_SUFFIXES:
        return read_plain(path)
    else:
        raise RecipeError(f"a text must be a file with suffix {', '.join((*TEXT_SUFFIXES, *FORMATS))}, got {path}")
    if not text.strip():
        raise RecipeError(f"{path} has no text")
    return text


def read_plain(path: str | Path) -> str:
    """Return the text of a plain file.

    Raises:
        RecipeError: if it cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the text {path}: {error}") from error
    if not text.strip():
        raise RecipeError(f"{path} has no text")
    return text


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """A text as token ids, and what stands at the beginning of every window of it.

    Args:
        ids: of the whole text, without special tokens.
        prefix: ids in front of each window: the tokens that the tokenizer puts before a text, BOS as a rule.
        prefix_names: the same, as the tokenizer writes them.
        suffix: ids behind each sample, as encoders have them (SEP).
    """

    ids: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    prefix_names: tuple[str, ...] = ()
    suffix: tuple[int, ...] = ()

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto", ends: bool = False) -> TokenStream:
        """Tokenize a text in one piece.

        Args:
            bos: "auto" = begin each window as the tokenizer begins a text; "always" with its BOS token, "never" with
                nothing. Models that were trained with BOS are far worse without it.
            ends: end each sample too as the tokenizer ends a text.

        Raises:
            RecipeError: for "always", if the tokenizer has no BOS token.
        """
        check_one_of("bos", bos, BOS)
        limit, tokenizer.model_max_length = tokenizer.model_max_length, int(1e30)  # no warning: it is cut afterwards
        try:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        finally:
            tokenizer.model_max_length = limit
        prefix = _prefix(tokenizer, bos)
        names = tuple(tokenizer.convert_ids_to_tokens(list(prefix)))
        return cls(tuple(ids), prefix, names, _around(tokenizer)[1] if ends else ())

    def windows(self, length: int, stride: int | None = None, most: int | None = None) -> Iterator[Window]:
        """Yield windows over the text from its beginning; each token is scored in one of them.

        Args:
            length: tokens of a window, with its prefix.
            stride: new tokens of each window after the first; None = all of it, so that windows do not overlap.
            most: number of windows; None = all.

        Raises:
            RecipeError: if a window has no room for two tokens, or the stride is not in [1, length without prefix].
        """
        body = self._body(length)
        step = body if stride is None else stride
        check_integer("stride", step, f"[1, {body + 1})")
        done = count = 0
        for begin in range(0, len(self.ids), step):
            if done >= len(self.ids) or (most is not None and count >= most):
                return
            end = min(begin + body, len(self.ids))
            first = begin == done and not self.prefix  # without a prefix nothing predicts the first token of a window
            scored = end - done - int(first)
            if scored > 0:
                yield Window(torch.tensor([[*self.prefix, *self.ids[begin:end]]]), scored)
            done, count = end, count + 1

    def samples(self, count: int, length: int, seed: int = 0) -> list[Tensor]:
        """Return windows at random places of the text, to calibrate with.

        Args:
            count: of windows.
            length: tokens of a window, with its prefix.

        Shapes: `(1, length)` each.

        Raises:
            RecipeError: if the text is shorter than one window.
        """
        check_positive_int("samples", count)
        body = self._body(length - len(self.suffix))
        if len(self.ids) < body:
            raise RecipeError(
                f"the calibration text has {len(self.ids)} tokens, and one sequence needs {body}: lower the length, or "
                "give more text"
            )
        draw = random.Random(seed)  # noqa: S311  places in a text, no secrets
        starts = [draw.randrange(len(self.ids) - body + 1) for _ in range(count)]
        return [torch.tensor([[*self.prefix, *self.ids[s : s + body], *self.suffix]]) for s in starts]

    def _body(self, length: int) -> int:
        check_integer("length", length, f"[{len(self.prefix) + 2}, inf)")
        return length - len(self.prefix)

    @property
    def begins(self) -> str:
        """How each window begins, for a report."""
        return f"each begins with {' '.join(self.prefix_names)}" if self.prefix else "without BOS"


@dataclasses.dataclass(frozen=True)
class Window:
    """Token ids `(1, tokens)`, of which the last `scored` are predicted."""

    ids: Tensor
    scored: int


def _prefix(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> tuple[int, ...]:
    if bos == "never":
        return ()
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise RecipeError(f"bos 'always' was requested, and {type(tokenizer).__name__} has no BOS token")
        return (int(tokenizer.bos_token_id),)
    return _around(tokenizer)[0]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what the tokenizer puts before a text, and behind it."""
    plain: Sequence[int] = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    whole: Sequence[int] = tokenizer(_SAMPLE)["input_ids"]
    starts = [i for i in range(len(whole)) if list(whole[i : i + len(plain)]) == list(plain)]
    return (tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(plain) :])) if starts else ((), ())


def calibration_batches(
    stream: TokenStream, count: int, length: int, seed: int, device: Any
) -> list[dict[str, Tensor]]:
    """Return sequences to calibrate with, one in each batch, as keyword arguments of a model."""
    return [{"input_ids": ids.to(device)} for ids in stream.samples(count, length, seed)]
