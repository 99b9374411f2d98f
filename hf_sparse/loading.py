"""Loading a model as it was saved: the class that its config names, whatever its head, and its tokenizer."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import RecipeError, SparsityError


def load_whole(name: str, revision: str = "main", **options: Any) -> PreTrainedModel:
    """Load a model with the head it was saved with: the class its config names, else `AutoModel`.

    Args:
        name: folder or Hub name.
        revision: branch, tag or commit on the Hub.
        **options: for `from_pretrained`.

    Raises:
        RecipeError: if it cannot be loaded.
        CheckpointError: if it is packed, and damaged.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        return _model_class(config.architectures).from_pretrained(name, revision=revision, **options)
    except SparsityError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"cannot load model '{name}': {error}") from error


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Args:
        model: folder or Hub name.
        revision: branch, tag or commit on the Hub.

    Raises:
        RecipeError: if there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"cannot load the tokenizer of model '{model}': {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # What transformers makes up where there are no files: every text would become a row of [UNK].
        raise RecipeError(f"model '{model}' has no tokenizer beside it (tokenizer.json, vocab.txt, ...)")
    return tokenizer


def _model_class(architectures: list[str] | None) -> Any:
    """Return the class of transformers with that name. The name is from a file, so it must be a model and no more."""
    for architecture in architectures or ():
        found = getattr(transformers, str(architecture), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModel
