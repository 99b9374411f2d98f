"""`hf-sparse drop`: remove whole layers or experts of a saved causal language model."""

from __future__ import annotations

import argparse

from ..options import add_model, add_revision, given, separate_output
from ..verb import VERBS, Verb


@VERBS.register("drop")
class Drop(Verb):
    """Remove the layers or experts that matter least."""

    summary = "remove the layers or experts of a causal language model that matter least on a text"
    example = "models/gemma --layers 4 --data calibration.txt --output small"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model(parser, "folder for the smaller model")
        parser.add_argument("--layers", type=int, metavar="N", help="number of transformer layers to remove")
        parser.add_argument(
            "--criterion",
            choices=("cosine", "loss"),
            default="cosine",
            help="importance of a layer: how far it turns its input, or what the loss rises by without it (cosine)",
        )
        parser.add_argument("--experts", type=float, metavar="S", help="fraction of the experts to remove, as in 0.25")
        parser.add_argument(
            "--selection",
            choices=("uniform", "global"),
            default="uniform",
            help="experts that compete: those of each mixture, or all (uniform)",
        )
        parser.add_argument("--merge", action="store_true", help="merge experts that do alike instead of dropping some")
        add_revision(parser)
        parser.add_argument("--data", required=True, metavar="FILE", help="text to measure on, or a file of examples")
        parser.add_argument("--text", dest="column", metavar="COLUMN", help="text column of a file of examples (text)")
        parser.add_argument("--samples", type=int, metavar="N", help="sequences (128)")
        parser.add_argument("--length", type=int, metavar="N", help="tokens of a sequence (2048)")
        parser.add_argument("--seed", type=int, help="of the places where sequences begin (0)")
        parser.add_argument("--bos", choices=("auto", "always", "never"), help="BOS before each sequence (auto)")

    def run(self, options: argparse.Namespace) -> None:
        from ...recipe.drop import drop_saved
        from ...recipe.prune import CalibrationText

        named = given(options, "column", "samples", "length", "seed", "bos")
        text = CalibrationText(options.data, **{key: value for key, value in named.items() if value is not None})
        output = separate_output(options.model, options.output)
        left = drop_saved(
            options.model,
            output,
            text,
            **given(options, "layers", "criterion", "experts", "selection", "merge", "revision"),
        )
        print(f"{left}\n\nSaved in {output}")
