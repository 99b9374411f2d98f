"""CoFi in training: weights of full size, and the masks and scales that the model multiplies by in `zs.pt`.

The scales are multiplied into the weights. Masked heads and neurons are zeros then, which `compact` removes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import CheckpointError
from ....formats.torch_bin import read_torch_bin
from ....modeling.architectures import SubBlock
from ..checkpoint import Checkpoint
from ..source import PendingTensor, register_source
from ..structure import self_attentions, sub_blocks
from .cofi import with_plain_class
from .dense import Dense

MASKS = "zs.pt"
_MODULE = "l0_module.pt"
_KNOWN = {"head_z", "head_layer_z", "intermediate_z", "mlp_z", "hidden_z"}
_DISTILLATION = "layer_transformation."
_LOST = (
    "{} of `{}` in zs.pt is 0: the model leaves out {}, and with it a layer norm that a model of transformers always "
    "computes, so its outputs would be wrong"
)

Scale = tuple[int, Tensor]
"""An axis of a tensor, and a factor for each of its lines."""


@register_source
class CoFiMasks(Dense):
    """Weights and masks that are not applied yet."""

    name = "CoFi with masks"
    rank = 34

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        folder = checkpoint.path
        if not checkpoint.config.get("model_type") or not folder.is_dir():
            return False
        if (folder / MASKS).is_file():
            return True
        if (folder / _MODULE).exists():
            raise CheckpointError(
                f"the checkpoint is one of CoFi whose masks are in {_MODULE}, a pickled module, which is not read. "
                f"Write them as {MASKS} first: torch.save(l0_module.forward(training=False), ...)"
            )
        return False

    def tensors(self) -> Iterator[PendingTensor]:
        _ = self._scales
        for tensor in super().tensors():
            if not tensor.key.startswith(_DISTILLATION):
                yield tensor

    def read(self, key: str) -> Tensor:
        """Read one tensor, with its scales multiplied in."""
        tensor = super().read(key)
        for axis, factors in self._scales.get(key, ()):
            tensor = tensor * factors.to(tensor.dtype).view(
                [-1 if axis == other else 1 for other in range(tensor.ndim)]
            )
        return tensor

    def config(self) -> dict[str, Any]:
        return with_plain_class(super().config())

    @cached_property
    def _scales(self) -> Mapping[str, list[Scale]]:
        """The scales of each stored tensor."""
        masks = _read_masks(self.checkpoint.path / MASKS)
        scales: dict[str, list[Scale]] = {}
        attentions = self_attentions(self.checkpoint)
        forwards = [block for block in sub_blocks(self.checkpoint) if block.kind == "feed_forward"]
        hidden = next(iter(attentions.values())).output.out_features
        _check_hidden(masks.get("hidden_z"), hidden)
        for layer, block in attentions.items():
            heads = _of_layer(masks, "head_z", layer, len(attentions), block.groups)
            whole = _of_layer(masks, "head_layer_z", layer, len(attentions), 1)
            *_, value = block.inputs
            self._add(scales, value, 0, heads.repeat_interleave(block.size))
            self._whole(scales, block, whole, _LOST.format(f"layer {layer}", "head_layer_z", "the attention"))
        for layer, block in enumerate(forwards):
            neurons = _of_layer(masks, "intermediate_z", layer, len(forwards), block.groups)
            whole = _of_layer(masks, "mlp_z", layer, len(forwards), 1)
            key = self.checkpoint.keys_by_name[f"{block.output_name}.weight"]
            scales.setdefault(key, []).append((1, neurons))
            self._whole(scales, block, whole, _LOST.format(f"layer {layer}", "mlp_z", "the feed-forward part"))
        return scales

    def _whole(self, scales: dict[str, list[Scale]], block: SubBlock, factor: Tensor, reason: str) -> None:
        if not bool(factor):
            raise CheckpointError(reason)
        self._add(scales, block.output_name, 0, factor.expand(block.output.out_features))

    def _add(self, scales: dict[str, list[Scale]], layer: str, axis: int, factors: Tensor) -> None:
        for own in ("weight", "bias"):
            key = self.checkpoint.keys_by_name.get(f"{layer}.{own}")
            if key is not None:
                scales.setdefault(key, []).append((axis, factors))


def _read_masks(path: Path) -> dict[str, Tensor]:
    stored = read_torch_bin([path])
    if unknown := stored.headers.keys() - _KNOWN:
        raise CheckpointError(f"{path} has the unknown mask '{min(unknown)}'; known: {', '.join(sorted(_KNOWN))}")
    return {key: stored.get(key).float() for key in stored.headers}


def _of_layer(masks: Mapping[str, Tensor], name: str, layer: int, layers: int, size: int) -> Tensor:
    """Return the part of a mask for one layer, ones where there is no such mask."""
    if name not in masks:
        return torch.ones(size)
    if masks[name].numel() != layers * size:
        raise CheckpointError(f"`{name}` in {MASKS} must have {layers} x {size} elements, got {masks[name].numel()}")
    return masks[name].reshape(layers, size)[layer]


def _check_hidden(mask: Tensor | None, size: int) -> None:
    if mask is None or (mask.numel() == size and bool((mask == 1).all())):
        return
    raise CheckpointError(
        f"`hidden_z` in {MASKS} masks or scales dimensions of the residual stream ({int((mask == 0).sum())} of {size} "
        "are 0): layer norms would run over those that are left, which no config of transformers expresses"
    )
