"""`hf-sparse compact`: remove pruned heads, neurons and sub-blocks from the architecture of a saved model."""

from __future__ import annotations

import argparse

from ..options import add_model, add_revision, separate_output
from ..verb import VERBS, Verb


@VERBS.register("compact")
class Compact(Verb):
    """Make a structurally pruned model smaller."""

    summary = "remove pruned heads, neurons and sub-blocks from the architecture of a saved model"
    example = "sparse --output small"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model(parser, "folder for the smaller model")
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...recipe.prune import compact_saved

        output = separate_output(options.model, options.output)
        print(f"{compact_saved(options.model, output, revision=options.revision)}\n\nSaved in {output}")
