"""`hf-sparse cache-teacher`: run the teacher of a recipe once over the training data and keep its outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import set_seed

from ..errors import RecipeError
from ..hf.trainer.teacher import make_distiller
from ..hf.trainer.teacher_cache import Written, write_cache
from .recipe import Recipe
from .task import Setup


def teach(recipe: Recipe, output: str | Path, dtype: str = "fp32", top: int | None = None) -> Written:
    """Write logits or embeddings of a recipe's teacher for every training example, and return how much that is.

    Train with them by `distillation: {cache: OUTPUT, ...}` in the same recipe.

    Args:
        output: folder for the cache.
        dtype: "fp32" or "fp16".
        top: how many tokens of each position are kept, the most likely ones; None = all.

    Raises:
        RecipeError: if the recipe has no teacher, or learns more from it than logits and embeddings.
    """
    if recipe.distillation is None:
        raise RecipeError("the recipe has no 'distillation' section, so there is no teacher to run")
    config = dataclasses.replace(recipe.distillation, cache=str(output))  # refuses what no cache can give
    task = recipe.model.kind
    examples = task.load_examples(recipe)
    set_seed(recipe.seed)  # the teacher "self" is the very model that training starts from
    model, tokenizer = task.load_model(recipe, examples)
    distiller = make_distiller(model, dataclasses.replace(config, cache=None))
    assert isinstance(distiller.teacher, torch.nn.Module)
    if torch.accelerator.is_available() and not config.load_in_8bit:
        distiller.teacher.to(torch.accelerator.current_accelerator())
    setup = Setup(recipe, recipe.training_arguments(), model, tokenizer, examples, [])
    return write_cache(distiller, task.teacher_batches(setup), output, tokenizer, dtype, top)
