"""Pruning a saved model in one shot: load, remove, save, without training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from .config import SparsityConfig
from .data import load_tokenizer
from .errors import RecipeError, SparsityError
from .oneshot import sparsify
from .report import Summary, summarize

logger = logging.getLogger(__name__)


def prune(name: str, group: Mapping[str, Any], output: str | os.PathLike[str], revision: str = "main") -> Summary:
    """Load a model, prune it, and save it packed with its tokenizer.

    Args:
        name: folder or Hub name.
        group: the keys of one group, see `GroupConfig`.
        output: folder that is written.
        revision: branch, tag or commit on the Hub.

    Raises:
        RecipeError: if the model cannot be loaded, or cannot be pruned as asked.
    """
    config = SparsityConfig(**group)
    model = load_whole(name, revision)
    sparsify(model, config)
    model.save_pretrained(output)
    try:
        load_tokenizer(name, revision).save_pretrained(output)
    except RecipeError as error:
        logger.warning("no tokenizer was copied: %s", error)
    return summarize(model)


def load_whole(name: str, revision: str = "main") -> PreTrainedModel:
    """Load a model with the head it was saved with: the class its config names, else `AutoModel`.

    Raises:
        RecipeError: if it cannot be loaded.
        CheckpointError: if it is packed, and damaged.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        return _model_class(config.architectures).from_pretrained(name, revision=revision)
    except SparsityError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot load model '{name}': {error}") from error


def _model_class(architectures: list[str] | None) -> Any:
    """Return the class of transformers with that name. The name is from a file, so it must be a model and no more."""
    for architecture in architectures or ():
        found = getattr(transformers, str(architecture), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModel
