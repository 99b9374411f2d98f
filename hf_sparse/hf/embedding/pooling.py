"""From hidden states to one vector for each text, by the modules of sentence-transformers beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from ...distillation.terms.base import EMBEDDING
from ...errors import RecipeError

logger = logging.get_logger(__name__)
MODULES = "modules.json"


class Pooling:
    """Make the embeddings of a transformer's outputs.

    Args:
        modules: what follows the transformer, as sentence-transformers has it: pooling, normalisation, dense layers.
    """

    def __init__(self, modules: nn.Module) -> None:
        self.modules = modules.eval().requires_grad_(False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Pooling:
        """Return the pooling that a model was saved with (`modules.json` beside it), else the mean over its tokens.

        Raises:
            RecipeError: without sentence-transformers, or where its modules cannot be loaded.
        """
        source = str(model.config._name_or_path or "")
        if not has_modules(source):
            logger.info("%s has no %s: the mean over its tokens is its embedding", source or "the model", MODULES)
            return cls(_default(model))
        sentence = load_sentence_transformer(source, device="cpu")
        return cls(nn.Sequential(*list(sentence.children())[1:]))

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        """Return one vector for each example.

        Args:
            outputs: of the transformer, with `last_hidden_state`.
            batch: what it was called with; its `attention_mask` says what is padding.
        """
        states: Tensor = outputs["last_hidden_state"]
        mask = batch.get("attention_mask")
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
        embedding: Tensor = self.modules.to(states.device)({"token_embeddings": states, "attention_mask": mask})[
            EMBEDDING
        ]
        return embedding


def has_modules(source: str, revision: str | None = None) -> bool:
    """Return whether a folder or a model of the Hub has the modules of sentence-transformers.

    Args:
        revision: branch, tag or commit on the Hub.
    """
    if not source or Path(source).is_dir():
        return bool(source) and (Path(source) / MODULES).is_file()
    try:
        return cached_file(source, MODULES, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
    except OSError:
        return False


def load_sentence_transformer(source: str, kind: str = "SentenceTransformer", **options: Any) -> Any:
    """Load a model of sentence-transformers.

    Args:
        source: folder or Hub name.
        kind: name of the class.
        **options: of the class.

    Raises:
        RecipeError: if the package is missing, or the model cannot be loaded.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise RecipeError(
            "embeddings and rerankers need sentence-transformers, which is not installed: pip install "
            "'hf-sparse[embedding]'"
        ) from error
    try:
        return getattr(sentence_transformers, kind)(source, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise RecipeError(f"cannot load '{source}' as {kind}: {error}") from error


def _default(model: PreTrainedModel) -> nn.Module:
    try:
        from sentence_transformers.sentence_transformer.modules import Pooling as Mean
    except ImportError as error:
        raise RecipeError(
            "pooling needs sentence-transformers 6 or later: pip install 'hf-sparse[embedding]'"
        ) from error
    return nn.Sequential(Mean(int(model.config.hidden_size), "mean"))
