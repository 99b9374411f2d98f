"""`hf-sparse sensitivity`: loss increase when one layer or head is pruned alone."""

from __future__ import annotations

import argparse
import json

from ...errors import RecipeError
from ..data_options import add_data, data_section
from ..options import add_json, add_revision
from ..verb import VERBS, Verb

DEFAULT_TOTAL = 0.8
"""Total sparsity that groups are suggested for, if the measured levels go as far."""


@VERBS.register("sensitivity")
class Sensitivity(Verb):
    """Measure sensitivity to pruning."""

    summary = "measure how sensitive the loss is to pruning each layer and head alone"
    example = "models/bert --data dev.jsonl --levels 0.5,0.9 --sparsity 0.8"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", help="folder or Hub name of a model with a task head")
        add_data(parser, "examples to measure on", required=True, samples=256, batch=True)
        parser.add_argument("--levels", default="0.5,0.7,0.9", metavar="S,S,...", help="sparsities (0.5,0.7,0.9)")
        parser.add_argument(
            "--sparsity",
            type=float,
            metavar="S",
            help="total sparsity to suggest groups for (0.8, or the highest level)",
        )
        parser.add_argument("--plot", metavar="FILE", help="write loss over sparsity: png, pdf or svg")
        add_json(parser)
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.allocation import check_total
        from ...analysis.sensitivity import as_recipe, sensitivity
        from ...reporting.plotting import check_picture

        try:
            levels = [float(level) for level in options.levels.split(",")]
        except ValueError as error:
            raise RecipeError(
                f"--levels must be numbers separated by commas, as in 0.5,0.9, got {options.levels!r}"
            ) from error
        sparsity = min(DEFAULT_TOTAL, max(levels)) if options.sparsity is None else options.sparsity
        check_total(sparsity, levels)  # now, not when all is measured
        if options.plot is not None:
            check_picture(options.plot)
        result = sensitivity(options.model, data_section(options), levels, options.batch, options.revision)
        if not options.json:
            print(result)
        groups = result.allocations(sparsity)
        if options.json:
            print(json.dumps({**result.to_dict(), "groups": groups}, indent=2))
        else:
            for way, suggested in groups.items():
                print(f"\n# {way}, {sparsity:g} in total\n{as_recipe(suggested)}", end="")
        if options.plot is not None:
            result.plot(options.plot)
