"""What an origin of checkpoints is: how it is recognized, what its tensors are, and what its model has lost.

A new origin is one file in `sources/` with a class of `Source` and `@register_source`, and one import there.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from ...errors import CheckpointError
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
        rank: origins are tried in ascending order; `Dense`, which takes any checkpoint, has 100.
        keeps_targets: a target stays one, also if packing does not make it smaller.
    """

    name: ClassVar[str]
    rank: ClassVar[int] = 50
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


SOURCES: list[type[Source]] = []
"""All origins, in the order in which they are tried."""

S = TypeVar("S", bound=type[Source])


def register_source(cls: S) -> S:
    """Let `source_of` try a class, in the order of its rank; of equal ones the last that was registered first.

    Raises:
        ValueError: if there is one of this name.
    """
    if any(other.name == cls.name for other in SOURCES):
        raise ValueError(f"the source '{cls.name}' is registered twice")
    place = sum(other.rank < cls.rank for other in SOURCES)
    SOURCES.insert(place, cls)
    return cls


def source_of(checkpoint: Checkpoint) -> Source:
    """Return the source that recognizes a checkpoint.

    Raises:
        CheckpointError: if it is of an origin that cannot be read.
    """
    for cls in SOURCES:
        if cls.recognizes(checkpoint):
            return cls(checkpoint)
    raise CheckpointError(f"{checkpoint.path} is of no origin that is read here")
