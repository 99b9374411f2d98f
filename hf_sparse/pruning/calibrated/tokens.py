"""Which tokens of a batch are padding: what a layer computes there is never used, and must not count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modeling.layer_kinds import KeptTokens
from .recording import Call

_NEVER = -100
"""Label of a position that is not trained, everywhere in transformers."""


def kept_tokens(batch: Mapping[str, Any], block: str, call: Call | None) -> KeptTokens:
    """Return what tells which tokens of the input of a layer count.

    A mask applies to inputs of its shape, `(examples, tokens)`, and to those with all tokens in one dimension, as the
    experts of a mixture have them. In a decoder behind an encoder the decoder's own mask does, except for the states
    of the encoder.

    Args:
        batch: keyword arguments of the model.
        block: name of the block that the layer is in.
        call: of that block, if it is known.

    Example:
        >>> import torch
        >>> kept = kept_tokens({"attention_mask": torch.tensor([[1, 1, 0]])}, "encoder.layer.0", None)
        >>> kept(torch.zeros(1, 3, 8)).tolist()
        [[True, True, False]]
    """
    own = _mask(batch.get("attention_mask"))
    behind_encoder = "decoder" in block.split(".") and ("labels" in batch or "decoder_input_ids" in batch)
    decoder = _decoder_mask(batch) if behind_encoder else None

    def kept(inputs: Tensor) -> Tensor | None:
        mask = own
        if behind_encoder and not (call is not None and call.gives(inputs)):
            mask = decoder
        if mask is None or inputs.shape[:-1] not in (mask.shape, (mask.numel(),)):
            return None
        return mask.reshape(inputs.shape[:-1]).to(inputs.device)

    return kept


def _decoder_mask(batch: Mapping[str, Any]) -> Tensor | None:
    if "decoder_attention_mask" in batch:
        return _mask(batch["decoder_attention_mask"])
    labels = batch.get("labels")
    if "decoder_input_ids" in batch or not isinstance(labels, Tensor):
        return None
    return _mask(labels != _NEVER)


def _mask(mask: Any) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    kept = mask.bool()
    return None if bool(kept.all()) else kept
