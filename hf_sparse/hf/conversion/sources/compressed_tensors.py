"""compressed-tensors before 0.15: `sparse-bitmask` and `sparse-24-bitmask`, and the `dense` that others left behind.

From 0.15 on the library itself loads such a checkpoint as random weights, with a warning
(`tests/hf/conversion/test_compressed_tensors_trap.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ....errors import CheckpointError
from ....formats.compressed_tensors import FORMATS, METHOD, decompress, find_compressed
from ..checkpoint import Checkpoint
from ..source import PendingTensor, Source, register_source
from .quantized import quantization


def stated_format(config: Mapping[str, Any]) -> str | None:
    """Return the sparse format that a config names; None if it does not name this library.

    Raises:
        CheckpointError: if the checkpoint is quantized too, or in a format that is not read.
    """
    stated = quantization(config)
    if stated.get("quant_method", METHOD if "sparsity_config" in stated else None) != METHOD:
        return None
    if stated.get("config_groups") or stated.get("transform_config"):
        raise CheckpointError(f"the checkpoint is quantized ({METHOD}), not only sparse, which convert does not read")
    sparsity = stated.get("sparsity_config") or {}
    found = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
    if found not in (*FORMATS, "dense"):
        raise CheckpointError(f"the format of {METHOD} is {found!r}, and convert reads {', '.join(FORMATS)}")
    return str(found)


@register_source
class CompressedTensors(Source):
    """The weights that were compressed are the targets."""

    name = METHOD
    rank = 20

    @classmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        found = stated_format(checkpoint.config)
        if found in FORMATS:
            return True
        return found is None and not checkpoint.config and bool(find_compressed(checkpoint.headers))

    def tensors(self) -> Iterator[PendingTensor]:
        headers, get = self.checkpoint.headers, self.checkpoint.get
        found = find_compressed(headers)
        for prefix, parts in found.items():
            read = partial(decompress, prefix, parts, get)
            matrix = math.prod(parts["shape"].shape) > 1
            yield PendingTensor(f"{prefix}.weight", read, packed=matrix, target=matrix)
        known = {f"{prefix}.{name}" for prefix, parts in found.items() for name in parts}
        for key in headers.keys() - known:
            yield PendingTensor(key, partial(get, key), packed=False)
