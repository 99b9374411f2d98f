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
    example = "sparse --batch 8 --data validation.jsonl --save"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        add_against(parser, "dense baseline (the same weights, dense)")
        parser.add_argument("--threads", type=int, metavar="N", help="number of torch threads (as configured)")
        parser.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (1)")
        parser.add_argument(
            "--length",
            type=int,
            metavar="N",
            help="tokens of each example; longer ones of --data are truncated (128, of --data 512, or what it takes)",
        )
        parser.add_argument("--data", metavar="FILE", help="time the examples of this file, with their lengths")
        parser.add_argument(
            "--text", action="append", metavar="COLUMN", help="text column of --data (text); twice for pairs"
        )
        parser.add_argument("--samples", type=int, default=256, metavar="N", help="number of examples of --data (256)")
        parser.add_argument(
            "--rounds", type=int, default=15, metavar="N", help="forward passes of each model, interleaved (15)"
        )
        parser.add_argument("--backend", choices=backends(), default="auto", help="see hf_sparse.to_runtime (auto)")
        parser.add_argument(
            "--engines",
            default="installed",
            metavar="LIST",
            help="also run the dense model in these, in as many threads: torch-compile, onnxruntime, openvino, "
            "onnxruntime-int8, with commas between; or none (those that are installed)",
        )
        parser.add_argument("--layers", action="store_true", help="also print the table of layers")
        parser.add_argument("--json", metavar="OUT", help="also write everything to this file")
        parser.add_argument(
            "--save", action="store_true", help="also write speed.json next to the model, for card, report and compare"
        )
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.bench_inputs import Examples
        from ...analysis.benchmark import bench
        from ...analysis.dense_engines import engines_named

        if options.save and not Path(options.model).is_dir():
            raise RecipeError(f"--save needs a local folder, got '{options.model}'; use --json OUT")
        keys = ("against", "threads", "batch", "length", "backend", "rounds", "revision")
        examples = None
        if options.data is not None:
            examples = Examples(options.data, tuple(options.text or ("text",)), options.samples)
        elif options.text:
            raise RecipeError("--text names a column of --data, which is not given")
        engines = engines_named(options.engines)
        done = bench(options.model, **given(options, *keys), examples=examples, engines=engines)
        print(f"{done.report}\n\n{done}" if options.layers else done)
        for path in filter(None, (options.json, options.save and Path(options.model) / SPEED)):
            write_text(path, json.dumps(done.to_dict(), indent=1) + "\n")
