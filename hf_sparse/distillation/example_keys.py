"""The examples of a padded batch, each by itself: what names it, and which parts of an output are its own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NEVER = -100  # label of a position that is not trained, everywhere in transformers
PER_EXAMPLE = ("logits", "sentence_embedding")
"""Outputs that have one entry for each example, where they have no positions."""
_MASKS = ("attention_mask", "decoder_attention_mask")


@dataclasses.dataclass(frozen=True)
class Examples:
    """A batch seen as examples without padding.

    Args:
        inputs: what a model is called with, without labels; for an encoder-decoder with `decoder_input_ids`.
        labels: of the batch; they say where the targets of an encoder-decoder are padded.
        writes: whether the model is an encoder-decoder.
    """

    inputs: Mapping[str, Any]
    labels: Tensor | None = None
    writes: bool = False

    def names(self) -> list[str]:
        """Return a name for each example that depends on its own inputs alone, not on padding or its neighbours.

        Example:
            >>> import torch
            >>> short = Examples({"input_ids": torch.tensor([[5, 7]]), "attention_mask": torch.tensor([[1, 1]])})
            >>> padded = Examples({"input_ids": torch.tensor([[5, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
            >>> short.names() == padded.names()
            True
        """
        tensors = {
            name: value for name, value in sorted(self.inputs.items()) if isinstance(value, Tensor) and value.ndim
        }
        plain = {name: value.detach().cpu() for name, value in tensors.items() if name not in _MASKS}
        masks = {name: mask.cpu() for name in plain if (mask := self._mask_of(name, plain[name])) is not None}
        count = len(next(iter(plain.values()))) if plain else 0
        return [
            _key({n: v[row][masks[n][row]] if n in masks else v[row] for n, v in plain.items()}) for row in range(count)
        ]

    def positions(self, name: str, output: Tensor) -> Tensor | None:
        """Return which positions of an output are not padding; None where it has one entry for each example.

        Args:
            name: of the output, as in "logits" or "start_logits".

        Shapes: output `(batch, ...)`; returns `(batch, length)`, bool.
        """
        if name in PER_EXAMPLE and output.ndim < 3:
            return None
        return self.targets if self.writes else self._of_texts(output)

    @property
    def targets(self) -> Tensor | None:
        """Which positions of target sequences are not padding."""
        mask = self.inputs.get("decoder_attention_mask")
        if self.labels is not None:
            return self.labels != _NEVER
        return None if mask is None else mask.bool()

    def _mask_of(self, name: str, value: Tensor) -> Tensor | None:
        mask = self.targets if name.startswith("decoder_") else self.inputs.get("attention_mask")
        return mask.bool() if mask is not None and value.shape[: mask.ndim] == mask.shape else None

    def _of_texts(self, output: Tensor) -> Tensor | None:
        mask = self.inputs.get("attention_mask")
        return mask.bool() if mask is not None and output.shape[: mask.ndim] == mask.shape else None


def _key(example: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in example.items():
        # One width for all whole numbers: a collator may make them 32 or 64 bits wide.
        value = value.double() if value.is_floating_point() else value.long()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
