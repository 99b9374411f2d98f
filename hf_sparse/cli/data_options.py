"""The options with which commands name texts with labels to look at, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipe.sections import DataSection


def add_data(
    parser: argparse.ArgumentParser, help_data: str, *, required: bool, label: str, samples: int | None, texts: str
) -> None:
    """Add --data, --text, --label, --samples and --length; columns and length are those of the run where it says them.

    Args:
        help_data: of --data.
        required: whether --data must be given.
        label: what the column with the label may hold.
        samples: how many texts by default; None = all.
        texts: help of --samples.
    """
    parser.add_argument("--data", required=required, metavar="FILE", help=help_data)
    parser.add_argument(
        "--text",
        action="append",
        metavar="COLUMN",
        help="column with the text (that of the recipe beside the model, else text); twice for pairs",
    )
    parser.add_argument(
        "--label", metavar="COLUMN", help=f"column with the label{label} (that of the recipe, else label)"
    )
    parser.add_argument("--samples", type=int, default=samples, metavar="N", help=texts)
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens kept of each text (as many as in the recipe, else 128)"
    )


def data_section(options: argparse.Namespace) -> DataSection:
    """Return the data that these options name; what they leave out is as the recipe beside the model says it.

    Raises:
        RecipeError: for columns or counts that are none.
        CheckpointError: if there is a recipe, and it is none.
    """
    from ..hf.hub.model_card import read_recipe
    from ..recipe.sections import DataSection

    of_run: dict[str, Any] = read_recipe(Path(options.model) / "recipe.yaml").get("data") or {}
    given = {"text": options.text, "label": options.label, "max_length": options.length}
    said = {key: value if value is not None else of_run.get(key) for key, value in given.items()}
    return DataSection(
        train=options.data,
        validation="none",  # nothing is held out: what is measured is no metric
        train_samples=options.samples,
        **{"text": "text", **{key: value for key, value in said.items() if value is not None}},
    )
