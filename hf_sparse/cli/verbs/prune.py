"""`hf-sparse prune`: one-shot pruning of a saved model."""

from __future__ import annotations

import argparse

from ..data_options import add_data, data_section
from ..options import add_model, add_revision, given, separate_output, spec
from ..verb import VERBS, Verb

GROUP = ("sparsity", "scorer", "pattern", "selection", "targets", "exclude")
"""Options that are keys of the sparsity section."""


@VERBS.register("prune")
class Prune(Verb):
    """Prune in one shot."""

    summary = "prune a model in one shot, without training"
    example = "models/bert --sparsity 0.5 --output sparse"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model(parser, "folder for the pruned model")
        parser.add_argument(
            "--sparsity", type=float, metavar="S", help="fraction of weights that are pruned, as in 0.5"
        )
        parser.add_argument("--scorer", type=spec, help="importance of a weight (magnitude)")
        parser.add_argument("--pattern", type=spec, help='weights pruned together (element); "2:4" needs no --sparsity')
        parser.add_argument("--selection", type=spec, help="which weights compete (uniform, global, threshold)")
        parser.add_argument("--targets", action="append", metavar="GLOB", help="names of layers; may be repeated")
        parser.add_argument("--exclude", action="append", metavar="GLOB", help="layers kept dense; may be repeated")
        add_revision(parser)
        purpose = "examples for the scorers gradient, taylor and head_importance"
        add_data(parser, purpose, required=False, samples=512, batch=True)

    def run(self, options: argparse.Namespace) -> None:
        from ...recipe.prune import prune

        group = {key: value for key, value in given(options, *GROUP).items() if value is not None}
        output = separate_output(options.model, options.output)
        section = data_section(options) if options.data is not None else None
        summary = prune(options.model, group, output, options.revision, section, options.batch)
        print(f"{summary}\n\nSaved in {output}")
