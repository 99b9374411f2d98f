"""`hf-sparse report`: an HTML report of a saved model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data_options import add_data, data_section
from ..options import add_against, add_folder
from ..verb import VERBS, Verb


@VERBS.register("report")
class Report(Verb):
    """Report on one model."""

    summary = "write an HTML report of a model: sparsity, sizes, speed, changed predictions"
    example = "sparse --against dense --data dev.jsonl --html report.html"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_folder(parser, "model")
        add_against(parser)
        parser.add_argument("--html", metavar="FILE", help="output file (DIR/report.html)")
        parser.add_argument("--bench", metavar="FILE", help="output of `bench --json` (DIR/speed.json, if it exists)")
        add_data(
            parser, "examples of a classifier, to compare predictions with --against", required=False, samples=None
        )

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.model_report import write_report

        output = options.html or str(Path(options.model) / "report.html")
        data = data_section(options) if options.data is not None else None
        write_report(options.model, output, options.against, options.bench, data)
        print(f"Saved in {output}")
