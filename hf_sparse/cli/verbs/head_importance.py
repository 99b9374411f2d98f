"""`hf-sparse head-importance`: importance of each attention head for a task."""

from __future__ import annotations

import argparse
import json

from ..data_options import add_data, data_section
from ..options import add_json, add_revision
from ..verb import VERBS, Verb


@VERBS.register("head-importance")
class HeadImportance(Verb):
    """Measure head importance."""

    aliases = ("heads",)
    summary = "measure the importance of each attention head for a task"
    example = "models/bert --data dev.jsonl --plot heads.png"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", help="folder or Hub name of a model with a task head")
        add_data(parser, "examples to measure on", required=True, samples=512, batch=True)
        parser.add_argument("--plot", metavar="FILE", help="write a heatmap: png, pdf or svg")
        add_json(parser)
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.head_table import heads
        from ...reporting.plotting import check_picture

        if options.plot is not None:
            check_picture(options.plot)
        table = heads(options.model, data_section(options), options.batch, options.revision)
        print(json.dumps(table.to_dict(), indent=2) if options.json else table)
        if options.plot is not None:
            table.plot(options.plot)
