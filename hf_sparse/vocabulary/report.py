"""The report of a trimmed vocabulary: as data, as text, as Markdown and as a plot; stored next to the model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..errors import CheckpointError
from ..utils.atomic_io import read_json, write_text
from ..utils.markdown import plain, table
from ..utils.text import format_bytes, shorten
from ..utils.validation import is_integer, is_number
from .held_out import HeldOut

REPORT = "vocabulary_report.json"
"""File next to a model whose vocabulary was trimmed."""

SHOWN = 20
"""Removed tokens that are listed."""


@dataclasses.dataclass(frozen=True)
class VocabularyReport:
    """What trimming a vocabulary has changed. `print` it for a table.

    Attributes:
        kind: of the tokenizer: WordPiece, BPE or Unigram.
        tokens, tokens_after: of the tokenizer.
        rows, rows_after: of the embeddings.
        table_parameters, table_parameters_after: of embeddings, heads and their biases, shared ones once.
        table_bytes, table_bytes_after: the same in bytes.
        model_parameters, model_parameters_after: of the whole model.
        examples, corpus_tokens: of the corpus that was counted.
        coverage: fraction of its tokens that stay as they are; 1 without a corpus.
        reasons: number of kept tokens by the first reason for which they stay.
        removed: the most frequent removed tokens, and how often they occur in the corpus.
        curve: coverage, and the number of tokens that reach it.
        held_out: measured on sequences that were not counted; None = there were none.
        caveat: what is not exact.
    """

    kind: str
    tokens: int
    tokens_after: int
    rows: int
    rows_after: int
    table_parameters: int
    table_parameters_after: int
    table_bytes: int
    table_bytes_after: int
    model_parameters: int
    model_parameters_after: int
    examples: int
    corpus_tokens: int
    coverage: float
    reasons: Mapping[str, int]
    removed: Sequence[tuple[str, int]]
    curve: Sequence[tuple[float, int]]
    held_out: HeldOut | None = None
    caveat: str | None = None

    @property
    def parameters_saved(self) -> int:
        """Parameters that the model no longer has."""
        return self.model_parameters - self.model_parameters_after

    @property
    def bytes_saved(self) -> int:
        """Bytes that the model no longer takes, in its own dtype."""
        return self.table_bytes - self.table_bytes_after

    def size_at(self, tokens: int) -> int:
        """Return the parameters of the model with this number of tokens."""
        width = self.table_parameters / self.rows if self.rows else 0.0
        return round(self.model_parameters - width * (self.rows - tokens))

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Label and value of each row of a table."""
        before, after = self.model_parameters, self.model_parameters_after
        share = self.table_parameters / before, self.table_parameters_after / after
        rows = [
            ("tokens", f"{self.tokens:,} -> {self.tokens_after:,} ({self.kind})"),
            ("parameters of the model", f"{before:,} -> {after:,} ({after / before:.1%})"),
            ("share of embeddings and heads", f"{share[0]:.1%} -> {share[1]:.1%}"),
            ("saved", f"{self.parameters_saved:,} parameters, {format_bytes(self.bytes_saved)}"),
        ]
        if self.examples:
            counted = f"{self.coverage:.4%} of {self.corpus_tokens:,} tokens in {self.examples:,} sequences"
            rows.append(("coverage of the corpus", counted))
        return rows + (_held_out_lines(self.held_out) if self.held_out else [])

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        out = [f"{name:<{width}}  {value}" for name, value in self.lines]
        if not self.held_out:
            out.append("No held-out sequences were given: fertility was not measured.")
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items() if count)
        out.append(f"kept: {reasons}")
        if self.removed:
            out.append(f"most frequent removed tokens: {', '.join(f'{t!r} {n:,}' for t, n in self.removed)}")
        return "\n".join([*out, *([f"Note: {self.caveat}."] if self.caveat else [])])

    def to_markdown(self) -> str:
        """Return the report as Markdown, for a model card. Tokens are escaped: they are untrusted."""
        parts = [table(("vocabulary", "before -> after"), [(plain(name), plain(value)) for name, value in self.lines])]
        if self.removed:
            listed = ", ".join(f"{plain(shorten(token, 40))} ({count:,})" for token, count in self.removed)
            parts.append(f"Most frequent removed tokens: {listed}.")
        if self.caveat:
            parts.append(f"{plain(self.caveat)}.")
        return "\n\n".join(parts)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw parameters of the model against coverage of the corpus, as png, pdf or svg.

        Raises:
            BackendError: without matplotlib.
            RecipeError: for a suffix that matplotlib cannot write, or a path that cannot be written.
        """
        from ..reporting.charts import set_log_ticks  # only here: hf_sparse itself draws nothing
        from ..reporting.plotting import new_figure, write_figure

        figure = new_figure(6, 4)
        axes = figure.subplots()
        points = [(1 - coverage, self.size_at(tokens) / 1e6) for coverage, tokens in self.curve]
        floor = min((missed for missed, _ in points if missed > 0), default=1e-5) / 10
        axes.plot([max(missed, floor) for missed, _ in points], [size for _, size in points], marker="o", markersize=4)
        axes.axhline(self.model_parameters / 1e6, linestyle="--", color="grey", linewidth=1)
        chosen = (max(1 - self.coverage, floor), self.model_parameters_after / 1e6)
        axes.scatter([chosen[0]], [chosen[1]], color="tab:orange", zorder=3, label="this model")
        set_log_ticks(
            axes, {0.5: "50 %", **{10.0**-n: f"{100 - 10.0 ** (2 - n):g} %" for n in range(1, 9)}, floor: "100 %"}
        )
        axes.invert_xaxis()
        axes.set_xlabel("tokens of the corpus that stay as they are")
        axes.set_ylabel("million parameters of the model")
        axes.set_title(f"{self.kind}, {self.tokens:,} tokens before (dashed)", fontsize=10)
        axes.legend()
        write_figure(figure, path)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; the source is untrusted.

        Raises:
            CheckpointError: for a value of the wrong kind.
        """
        checks = {"int": is_integer, "float": is_number, "str": _is_text, "str | None": _is_text_or_none}
        values = {
            field.name: _checked(data, field.name, checks[str(field.type)])
            for field in dataclasses.fields(cls)
            if str(field.type) in checks
        }
        held_out = data.get("held_out")
        if held_out is not None:
            names = [field.name for field in dataclasses.fields(HeldOut)]
            held_out = HeldOut(**{name: _checked(held_out, name, is_integer) for name in names})
        return cls(
            **values,
            reasons=dict(
                _pairs({"reasons": list(_checked(data, "reasons", _is_mapping).items())}, "reasons", _is_text)
            ),
            removed=_pairs(data, "removed", _is_text),
            curve=_pairs(data, "curve", is_number),
            held_out=held_out,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the report next to a model, where `hf-sparse report` and `hf-sparse card` find it."""
        write_text(Path(folder) / REPORT, json.dumps(self.to_dict(), indent=2) + "\n")


def read_report(folder: str | os.PathLike[str]) -> VocabularyReport | None:
    """Read the report next to a model; None if there is none.

    Raises:
        CheckpointError: if the file is not one.
    """
    data = read_json(Path(folder) / REPORT)
    return None if data is None else VocabularyReport.from_dict(data)


def carry_report(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Copy the report of a model to the folder of one that was made from it; where there is none, remove a stale one.

    Raises:
        CheckpointError: if the file is not a report.
    """
    report = read_report(source) if Path(source).is_dir() else None
    if report is not None:
        report.save(output)
    else:
        (Path(output) / REPORT).unlink(missing_ok=True)


def _held_out_lines(held: HeldOut) -> list[tuple[str, str]]:
    before, after = held.fertility
    changed = f"{held.changed:,} of {held.examples:,} sequences"
    growth = f", which get {held.growth - 1:.2%} longer" if held.changed else ""
    rows = [
        ("coverage of held-out sequences", f"{held.coverage:.4%} of {held.tokens:,} tokens"),
        ("fertility (tokens per word), held out", f"{before:.4f} -> {after:.4f}"),
        ("fall back to smaller pieces, held out", changed + growth),
    ]
    if held.unknown or held.unknown_after:
        rows.append(("unknown tokens, held out", f"{held.unknown:,} -> {held.unknown_after:,}"))
    return rows


def _checked(data: Any, key: str, check: Any) -> Any:
    value = data.get(key) if isinstance(data, Mapping) else None
    if not check(value):
        raise CheckpointError(f"{REPORT} is not one that hf_sparse wrote: `{key}` is {shorten(value)}")
    return value


def _pairs(data: Any, key: str, check: Any) -> tuple[tuple[Any, int], ...]:
    """Return a list of pairs of something and a number."""

    def good(found: Any) -> bool:
        return isinstance(found, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 and check(pair[0]) and is_integer(pair[1])
            for pair in found
        )

    return tuple((first, second) for first, second in _checked(data, key, good))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)
