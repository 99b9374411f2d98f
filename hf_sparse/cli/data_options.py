"""The options with which a verb names labelled examples to evaluate a model on, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipe.sections import DataSection


def add_data(
    parser: argparse.ArgumentParser,
    purpose: str,
    *,
    required: bool,
    samples: int | None,
    batch: bool = False,
    plain: bool = False,
) -> None:
    """Add --data, --text, --label, --samples, --length and, on request, --batch.

    Columns and length default to those of the recipe stored next to the model.

    Args:
        purpose: what the examples are for, as in "examples to measure on".
        required: whether --data must be given.
        samples: number of examples by default; None = all.
        batch: whether the verb has a batch size.
        plain: whether a plain text is taken too, in sequences; then the defaults of --samples and --length depend.
    """
    files = "json, jsonl, csv, tsv or parquet" + (", or plain text" if plain else "")
    parser.add_argument("--data", required=required, metavar="FILE", help=f"{purpose}: {files}")
    parser.add_argument(
        "--text",
        action="append",
        metavar="COLUMN",
        help="text column (that of the recipe next to the model, else text); twice for pairs",
    )
    parser.add_argument(
        "--label", metavar="COLUMN", help="column with the label or target text (that of the recipe, else label)"
    )
    default = (512 if plain else "all") if samples is None else samples
    of_texts = "; of sequences of text 128" if plain else ""
    parser.add_argument(
        "--samples", type=int, default=samples, metavar="N", help=f"number of examples ({default}{of_texts})"
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens per example, longer ones are truncated (that of the recipe, else 128"
        + ("; per sequence of text 2048)" if plain else ")"),
    )
    if batch:
        parser.add_argument("--batch", type=int, default=16, metavar="N", help="examples per batch (16)")


def data_section(options: argparse.Namespace) -> DataSection:
    """Return the data that the options name; defaults come from the recipe next to the model.

    Raises:
        RecipeError: for invalid columns or counts.
        CheckpointError: if recipe.yaml cannot be read.
    """
    from ..hf.hub.model_card import read_recipe
    from ..recipe.sections import DataSection

    of_run: dict[str, Any] = read_recipe(Path(options.model) / "recipe.yaml").get("data") or {}
    requested = {"text": options.text, "label": options.label, "max_length": options.length}
    merged = {key: value if value is not None else of_run.get(key) for key, value in requested.items()}
    return DataSection(
        train=options.data,
        validation="none",  # nothing is held out: what is measured is not a metric of a run
        train_samples=options.samples,
        **{"text": "text", **{key: value for key, value in merged.items() if value is not None}},
    )
