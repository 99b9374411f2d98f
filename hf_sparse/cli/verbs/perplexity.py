"""`hf-sparse perplexity`: perplexity of causal language models on a text."""

from __future__ import annotations

import argparse
import json

from ..options import add_json, add_revision, given
from ..verb import VERBS, Verb


@VERBS.register("perplexity")
class Perplexity(Verb):
    """Measure perplexity."""

    summary = "measure the perplexity of a causal language model on a text, alone or beside another"
    example = "sparse --data test.txt --against models/gemma"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", help="folder or Hub name; its tokenizer is used")
        parser.add_argument(
            "--data", required=True, metavar="FILE", help="plain text, or json, jsonl, csv, tsv or parquet"
        )
        parser.add_argument("--against", metavar="MODEL", help="measure this model too, and compare predictions")
        parser.add_argument("--text", default="text", metavar="COLUMN", help="column with the text (text)")
        parser.add_argument(
            "--length", type=int, metavar="N", help="tokens of a window (2048, or what the model takes)"
        )
        parser.add_argument(
            "--stride", type=int, metavar="N", help="new tokens of each window; fewer give more context (all)"
        )
        parser.add_argument("--samples", type=int, metavar="N", help="number of windows from the beginning (all)")
        parser.add_argument(
            "--bos",
            choices=("auto", "always", "never"),
            default="auto",
            help="BOS before each window: auto = as the tokenizer begins a text (auto)",
        )
        parser.add_argument(
            "--backend",
            metavar="NAME",
            help="measure the model in runtime form, as in bitmask-int8; --against stays dense (as it is loaded)",
        )
        add_json(parser)
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.perplexity import perplexity

        measured = perplexity(
            options.model,
            options.data,
            column=options.text,
            **given(options, "against", "length", "stride", "samples", "bos", "revision", "backend"),
        )
        print(json.dumps(measured.to_dict(), indent=2) if options.json else measured)
