"""`hf-sparse trim-vocab`: remove the tokens that a corpus does not need from a saved model and its tokenizer."""

from __future__ import annotations

import argparse
import json

from ..options import add_json, add_revision, given, separate_output
from ..verb import VERBS, Verb

CRITERIA = ("coverage", "min_count", "pad_to_multiple_of")
"""Options that are arguments of `hf_sparse.trim_vocabulary`."""


@VERBS.register("trim-vocab")
class TrimVocab(Verb):
    """Trim a vocabulary."""

    summary = "remove the tokens that a corpus does not need from a model and its tokenizer"
    example = "models/bert --data corpus.txt --coverage 0.9999 --output small"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", help="folder or Hub name")
        parser.add_argument("--output", required=True, metavar="DIR", help="folder for the smaller model")
        parser.add_argument(
            "--data", metavar="FILE", help="corpus: a sequence per line, or json, jsonl, csv, tsv, parquet"
        )
        parser.add_argument("--text", default="text", metavar="COLUMN", help="column of a file that has some (text)")
        parser.add_argument(
            "--held-out", metavar="FILE", help="sequences to measure on (each 20th of --data, which is not counted)"
        )
        parser.add_argument("--coverage", type=float, metavar="F", help="fraction of the tokens of --data to keep (1)")
        parser.add_argument("--min-count", type=int, metavar="N", help="keep tokens that occur N times, instead")
        parser.add_argument(
            "--keep", action="append", default=[], metavar="TOKEN", help="a token to keep; may be repeated"
        )
        parser.add_argument(
            "--script",
            action="append",
            default=[],
            metavar="NAME",
            help="keep all tokens in a Unicode script, such as Latin; may be repeated",
        )
        parser.add_argument(
            "--drop-characters",
            action="store_true",
            help="also remove single characters that are not needed; they become bytes or unknown",
        )
        parser.add_argument(
            "--pad-to-multiple-of", type=int, metavar="N", help="keep more tokens, up to a multiple of N rows"
        )
        parser.add_argument("--plot", metavar="FILE", help="write size over coverage: png, pdf or svg")
        add_json(parser)
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...recipe.trim import check_corpus, trim_saved
        from ...reporting.plotting import check_picture

        output = separate_output(options.model, options.output)
        check_corpus(options.data, options.keep, options.script)
        if options.plot is not None:
            check_picture(options.plot)  # now, not when all is measured
        report = trim_saved(
            options.model,
            output,
            options.data,
            options.held_out,
            options.text,
            options.revision,
            keep=options.keep,
            scripts=options.script,
            keep_characters=not options.drop_characters,
            **given(options, *CRITERIA),
        )
        print(json.dumps(report.to_dict(), indent=2) if options.json else f"{report}\n\nSaved in {output}")
        if options.plot is not None:
            report.plot(options.plot)
