"""`hf-sparse teach`: run the teacher of a recipe once over the training data and keep what it says."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import torch
from transformers import set_seed

from ..errors import RecipeError
from ..hf.auto import load_tokenizer
from ..hf.trainer.teacher import make_distiller
from ..hf.trainer.teacher_cache import batches_of, write_cache
from .data import load_examples
from .recipe import Recipe
from .train import collator_for, load_model


def teach(recipe: Recipe, output: str | Path, dtype: str = "fp32") -> int:
    """Write the logits of a recipe's teacher for every training example, and return how many examples there are.

    Train with them by `distillation: {cache: OUTPUT, ...}` in the same recipe.

    Args:
        output: folder for the cache.
        dtype: "fp32" or "fp16".

    Raises:
        RecipeError: if the recipe has no teacher, or learns more from it than logits.
    """
    if recipe.distillation is None:
        raise RecipeError("the recipe has no 'distillation' section, so there is no teacher to ask")
    config = dataclasses.replace(recipe.distillation, cache=str(output))  # refuses what no cache can give
    tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
    examples = load_examples(recipe.data, recipe.model.predicts)
    set_seed(recipe.seed)  # the teacher "self" is the very model that training starts from
    model = load_model(recipe.model, examples)
    train, _ = examples.tokenized(tokenizer, recipe.data.max_length, recipe.data.max_target_length)
    distiller = make_distiller(model, dataclasses.replace(config, cache=None))
    assert isinstance(distiller.teacher, torch.nn.Module)
    if torch.accelerator.is_available() and not config.load_in_8bit:
        distiller.teacher.to(torch.accelerator.current_accelerator())
    accepted = inspect.signature(model.forward).parameters
    batches = batches_of(
        train, collator_for(recipe, tokenizer, model), accepted, recipe.training_arguments().eval_batch_size
    )
    return write_cache(distiller, batches, output, tokenizer, dtype)
