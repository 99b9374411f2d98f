"""`hf-sparse train`: run a recipe, or all its stages."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..options import add_overrides
from ..verb import VERBS, Verb


@VERBS.register("train")
class Train(Verb):
    """Fine-tune the model of a recipe."""

    summary = "fine-tune the model of a recipe, sparse or dense, or run all its stages"
    example = "recipes/sst2_magnitude.yaml --set sparsity.sparsity=0.8 --output runs/sst2"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("recipe", help="YAML file, see recipes/")
        add_overrides(parser)
        parser.add_argument(
            "--output", metavar="DIR", help="output folder (training.output_dir of the recipe, else runs/RECIPE)"
        )
        parser.add_argument(
            "--resume", action="store_true", help="resume from the last complete checkpoint in the output folder"
        )
        parser.add_argument(
            "--allow", action="append", default=[], metavar="KEY",
            help="with --resume: a key of the recipe that may differ from the checkpoint; may be repeated",
        )  # fmt: skip
        parser.add_argument(
            "--overwrite", action="store_true", help="replace model and checkpoints of another run in the output folder"
        )

    def run(self, options: argparse.Namespace) -> None:
        from ...recipe.recipe import Recipe
        from ...recipe.stages import has_stages, load_stages, run_stages
        from ...recipe.train import run

        overrides = list(options.overrides)
        if options.output is not None:
            overrides.append(f"training.output_dir={json.dumps(options.output)}")
        how = {key: getattr(options, key) for key in ("resume", "overwrite", "allow")}
        if has_stages(options.recipe):
            result = run_stages(load_stages(options.recipe, overrides), **how)
        else:
            recipe = Recipe.load(options.recipe, overrides)
            recipe.check_models(Path(options.recipe).parent)
            result = run(recipe, **how)
        print(f"{result.summary}\n\nModel, metrics and report.md are in {result.output}")
