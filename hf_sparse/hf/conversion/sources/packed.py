"""Packed by hf_sparse; a checkpoint of a Trainer gives the masked model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ....formats.codecs import decode, layout
from ....formats.manifest import Manifest, TensorEntry
from ...quantization.pack_state import is_training_state
from ..checkpoint import Checkpoint
from ..source import PendingTensor, Source, register_source


@register_source
class Packed(Source):
    """A checkpoint of ours: its targets and what it has lost stay as they are."""

    name = "packed"
    rank = 0
    keeps_targets = True

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.manifest is not None

    @property
    def _manifest(self) -> Manifest:
        assert self.checkpoint.manifest is not None
        return self.checkpoint.manifest

    def tensors(self) -> Iterator[PendingTensor]:
        """Yield the tensors. What a Trainer needs to go on with training stays behind."""
        manifest = self._manifest
        targets = set(manifest.targets)
        for key, entry in manifest.tensors.items():
            if not is_training_state(key, manifest.tensors):
                target = key in targets
                yield PendingTensor(key, partial(self._decode, key, entry), target or entry.codec != "dense", target)

    def _decode(self, key: str, entry: TensorEntry) -> Tensor:
        return decode(entry, {suffix: self.checkpoint.get(key + suffix) for suffix in layout(entry, key)}, key)

    def extra(self) -> Mapping[str, Any]:
        return self._manifest.extra
