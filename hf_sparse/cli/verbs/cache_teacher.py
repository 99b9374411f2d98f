"""`hf-sparse cache-teacher`: write the logits of a teacher for every training example, once."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import RecipeError
from ..options import add_overrides
from ..verb import VERBS, Verb


@VERBS.register("cache-teacher")
class CacheTeacher(Verb):
    """Cache teacher logits for distillation."""

    aliases = ("teach",)
    summary = "cache the teacher logits of a recipe for every training example"
    example = "distil.yaml --output cache"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("recipe", help="YAML file with a distillation section")
        parser.add_argument("--output", metavar="DIR", help="folder of the cache (distillation.cache of the recipe)")
        parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the logits on disk (fp32)")
        parser.add_argument(
            "--top", type=int, metavar="K", help="keep the K most likely tokens of each position alone (all)"
        )
        add_overrides(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...recipe.cache_teacher import teach
        from ...recipe.recipe import Recipe
        from ...utils.text import format_bytes

        recipe = Recipe.load(options.recipe, options.overrides)
        recipe.check_models(Path(options.recipe).parent)
        output = options.output or (recipe.distillation.cache if recipe.distillation is not None else None)
        if output is None:
            raise RecipeError("the cache needs a folder: give --output DIR, or distillation.cache in the recipe")
        count, size = teach(recipe, output, options.dtype, options.top)
        print(
            f"Logits for {count} examples are in {output} ({format_bytes(size)}); train with "
            f"distillation.cache={output}"
        )
