"""Loading a model as it was saved: the class that its config names, whatever its head."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

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


def _model_class(architectures: list[str] | None) -> Any:
    """Return the class of transformers with that name. The name is from a file, so it must be a model and no more."""
    for architecture in architectures or ():
        found = getattr(transformers, str(architecture), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModel
