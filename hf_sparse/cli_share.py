"""The commands that show results: hf-sparse report | compare | sensitivity."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the commands to the parser of `hf-sparse`."""
    report = commands.add_parser("report", help="write what was removed, and what it changed, as one HTML page")
    report.add_argument("model", metavar="DIR", help="folder of a saved model")
    report.add_argument("--against", metavar="DENSE_DIR", help="the dense model to compare with")
    report.add_argument("--html", metavar="FILE", help="the page (DIR/report.html)")
    report.add_argument("--bench", metavar="FILE", help="JSON with timings, for the table of speed")
    _add_data(report, "texts of a classifier, for what pruning changed", required=False)
    report.set_defaults(command=_report)


def _add_data(parser: argparse.ArgumentParser, what: str, required: bool) -> None:
    parser.add_argument("--data", required=required, metavar="FILE", help=f"{what}: json, jsonl, csv, tsv or parquet")
    parser.add_argument("--text", action="append", metavar="COLUMN", help="column with the text (text); twice for pairs")
    parser.add_argument("--label", default="label", metavar="COLUMN", help="column with the label (label)")
    parser.add_argument("--samples", type=int, default=None if not required else 256, metavar="N", help="texts to use")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens kept of each text (128)")


def _section(options: argparse.Namespace) -> Any:
    from .recipe_sections import DataSection

    return DataSection(
        train=options.data,
        validation="none",  # nothing is trained, so nothing is held out
        text=options.text or "text",
        label=options.label,
        max_length=options.length,
        train_samples=options.samples,
    )


def _report(options: argparse.Namespace) -> None:
    from .report_page import write_report

    output = options.html or str(Path(options.model) / "report.html")
    data = _section(options) if options.data is not None else None
    write_report(options.model, output, options.against, options.bench, data)
    print(f"Saved in {output}")
