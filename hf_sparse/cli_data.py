"""The options with which commands name texts with labels to look at, without training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe_sections import DataSection


def add_data(
    parser: argparse.ArgumentParser, help_data: str, *, required: bool, label: str, samples: int | None, texts: str
) -> None:
    """Add --data, --text, --label, --samples and --length.

    Args:
        help_data: of --data.
        required: whether --data must be given.
        label: what the column with the label may hold.
        samples: how many texts by default; None = all.
        texts: help of --samples.
    """
    parser.add_argument("--data", required=required, metavar="FILE", help=help_data)
    parser.add_argument(
        "--text", action="append", metavar="COLUMN", help="column with the text (text); twice for pairs"
    )
    parser.add_argument("--label", default="label", metavar="COLUMN", help=f"column with the label{label}")
    parser.add_argument("--samples", type=int, default=samples, metavar="N", help=texts)
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens kept of each text (128)")


def data_section(options: argparse.Namespace) -> DataSection:
    """Return the data that these options name."""
    from .recipe_sections import DataSection

    return DataSection(
        train=options.data,
        validation="none",  # nothing is held out: what is measured is no metric
        text=options.text or "text",
        label=options.label,
        max_length=options.length,
        train_samples=options.samples,
    )
