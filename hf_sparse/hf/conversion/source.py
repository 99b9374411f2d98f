"""What an origin of checkpoints is: how it is recognized, what its tensors are, and what its model has lost.

A new origin is one file in `sources/` with a class of `Source`, and one line in its `SOURCES`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ...formats.structure import EDITS_KEY, Edits
from .checkpoint import Checkpoint


class PendingTensor(NamedTuple):
    """A tensor that is not read yet.

    Attributes:
        key: its name in the output.
        read: returns it, dense.
        packed: whether it is to be packed; None = its zeros decide, and make it a target.
        target: whether it was requested to be sparse.
    """

    key: str
    read: Callable[[], Tensor]
    packed: bool | None
    target: bool = False


class Source(abc.ABC):
    """One checkpoint of one origin.

    Args:
        checkpoint: what is read.

    Attributes:
        name: of the origin, for the report.
        keeps_targets: a target stays one, also if packing does not make it smaller.
    """

    name: ClassVar[str]
    keeps_targets: ClassVar[bool] = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @classmethod
    @abc.abstractmethod
    def recognizes(cls, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is of this origin, from its config and the names of its tensors.

        Raises:
            CheckpointError: if it is, and cannot be read: naming what it has that no model here can express.
        """

    @abc.abstractmethod
    def tensors(self) -> Iterator[PendingTensor]:
        """Yield the tensors of the model.

        Raises:
            CheckpointError: if they contradict each other or the config.
        """

    def config(self) -> dict[str, Any]:
        """Return the config of the model, without what says how this origin stored it."""
        dropped = ("quantization_config", "compression_config")
        return {key: value for key, value in self.checkpoint.config.items() if key not in dropped}

    def edits(self) -> Edits:
        """Return the heads and neurons that the model has lost, compared with the one that `config` describes.

        Raises:
            CheckpointError: if what is left cannot be expressed.
        """
        return Edits()

    def extra(self) -> Mapping[str, Any]:
        """Return `extra` of the manifest of the output."""
        edits = self.edits()
        return {EDITS_KEY: edits.to_dict()} if edits else {}
