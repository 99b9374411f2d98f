"""Pruning a saved model in one shot: load, remove, save, without training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from .config import SparsityConfig
from .errors import RecipeError
from .loading import load_tokenizer, load_whole
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
