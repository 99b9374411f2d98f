"""Embeddings that multiply what they look up by a constant, as those of Gemma and BART do."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import RecipeError
from ..class_swap import plain_class_of


@torch.no_grad()
def embedding_scale(layer: nn.Embedding, where: str = "an embedding") -> float:
    """Return the factor of an embedding; 1 for a plain one.

    Args:
        where: its name, for messages.

    Raises:
        RecipeError: if it computes anything else, or updates its table while it looks up.

    Example:
        >>> embedding_scale(nn.Embedding(4, 2))
        1.0
    """
    name = plain_class_of(layer).__name__
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        raise RecipeError(
            f"{where} has max_norm, scale_grad_by_freq or sparse=True, so it cannot have another form; exclude it"
        )
    if plain_class_of(layer).forward is nn.Embedding.forward:
        return 1.0
    stated: Any = getattr(layer, "scalar_embed_scale", getattr(layer, "embed_scale", None))
    if stated is None:
        raise RecipeError(f"{where} is a {name}, and what that computes beside the look-up would be lost; exclude it")
    scale = float(stated)
    if isinstance(getattr(layer, "embed_scale", None), Tensor):  # it is rounded to the dtype of the table
        scale = float(torch.tensor(scale, device="cpu").to(layer.weight.dtype))
    if not layer.weight.is_meta:
        ids = torch.arange(min(4, layer.num_embeddings), device=layer.weight.device)
        if not torch.equal(cast(Tensor, layer(ids)), layer.weight[ids] * scale):
            raise RecipeError(
                f"{where} is a {name}, which computes something else than {scale:g} times its rows; exclude it"
            )
    return scale
