"""`hf-sparse bench`: time a saved sparse model against its dense baseline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...errors import RecipeError
from ...profiling.speed_record import SPEED
from ...runtime import backends
from ..options import add_against, add_model, add_revision, given, write_text
from ..verb import VERBS, Verb


@VERBS.register("bench")
class Bench(Verb):
    """Benchmark a sparse model."""

    summary = "benchmark a saved sparse model after to_runtime against a dense baseline"
    example = "sparse --batch 8 --length 64 --save"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        add_against(parser, "dense baseline (the same weights, dense)")
        parser.add_argument("--threads", type=int, metavar="N", help="number of torch threads (as configured)")
        parser.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (1)")
        parser.add_argument(
            "--length", type=int, metavar="N", help="sequence length (128, or what the model takes where that is less)"
        )
        parser.add_argument(
            "--rounds", type=int, default=15, metavar="N", help="forward passes of each model, interleaved (15)"
        )
        parser.add_argument("--backend", choices=backends(), default="auto", help="see hf_sparse.to_runtime (auto)")
        parser.add_argument("--layers", action="store_true", help="also print the table of layers")
        parser.add_argument("--json", metavar="OUT", help="also write everything to this file")
        parser.add_argument(
            "--save", action="store_true", help="also write speed.json next to the model, for card, report and compare"
        )
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.benchmark import bench

        if options.save and not Path(options.model).is_dir():
            raise RecipeError(f"--save needs a local folder, got '{options.model}'; use --json OUT")
        keys = ("against", "threads", "batch", "length", "backend", "rounds", "revision")
        done = bench(options.model, **given(options, *keys))
        print(f"{done.report}\n\n{done}" if options.layers else done)
        for path in filter(None, (options.json, options.save and Path(options.model) / SPEED)):
            write_text(path, json.dumps(done.to_dict(), indent=1) + "\n")
