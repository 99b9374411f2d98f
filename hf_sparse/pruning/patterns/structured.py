"""Heads, neurons and sub-blocks (structured pruning): groups that go through several weights of a model at once.

Which weights these are, an architecture knows; a pattern here says how each of them is divided. What is pruned can be
removed from the model afterwards (`hf_sparse.compact`), which makes it smaller and faster on every device.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from ...config.sparsity import PATTERNS
from ...errors import PatternError
from ..selection import Global, Selection
from .base import Pattern, Reduce, Shape


@dataclasses.dataclass(frozen=True)
class Lines(Pattern):
    """Groups of consecutive rows or columns: the part that one weight has in the groups of a structure.

    Args:
        axis: 0 = rows (outputs), 1 = columns (inputs).
        size: of a group; 0 = all rows or columns together are one.

    Example:
        >>> import torch
        >>> Lines(axis=0, size=2).pool(torch.tensor([[1.0], [3.0], [5.0], [7.0]])).tolist()
        [2.0, 6.0]
    """

    axis: int
    size: int
    name: ClassVar[str] = "lines"

    def _size(self, shape: Shape) -> int:
        return self.size or shape[self.axis]

    def groups_shape(self, shape: Shape) -> Shape:
        return (shape[self.axis] // self._size(shape),)

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        lines = scores if self.axis == 0 else scores.t()
        groups = lines.reshape(*self.groups_shape(tuple(scores.shape)), -1)
        return groups.mean(1) if reduce == "mean" else groups.sum(1)

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        lines = kept.repeat_interleave(self._size(shape))
        return (lines[:, None] if self.axis == 0 else lines[None, :]).expand(shape)


class Structure(Pattern):
    """Base of the patterns that need an architecture.

    Attributes:
        kinds: the sub-blocks that have such groups.
    """

    kinds: ClassVar[tuple[Literal["attention", "feed_forward"], ...]]
    structural = True

    def __str__(self) -> str:
        return self.name

    def part(self, axis: int, size: int) -> Lines:
        """Return how one weight of a sub-block is divided.

        Args:
            axis: 0 for the layers that go in, 1 for the one that goes out.
            size: rows of a head, 1 for neurons.
        """
        return Lines(axis, size)

    def check(self, shape: Shape, where: str) -> None:
        super().check(shape, where)
        raise PatternError(
            f"pattern {self.name} spans several weights of a sub-block and does not fit one weight alone, such as "
            f"'{where}'"
        )


@PATTERNS.register("head")
@dataclasses.dataclass(frozen=True)
class Head(Structure):
    """Attention heads: rows of query, key and value with their biases, and the columns of the output layer.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?".
    """

    kinds = ("attention",)


@PATTERNS.register("neuron")
@dataclasses.dataclass(frozen=True)
class Neuron(Structure):
    """Neurons: a row of the first feed-forward layer (of both, if gated) with its bias, and a column of the last.

    Source: Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 3 (rows and columns of the "hybrid").
    """

    kinds = ("feed_forward",)


@PATTERNS.register("head+neuron")
@dataclasses.dataclass(frozen=True)
class HeadNeuron(Structure):
    """Heads of all attentions and neurons of all feed-forward parts, which share one selection: a budget, above all."""

    kinds = ("attention", "feed_forward")


@PATTERNS.register("layer")
@dataclasses.dataclass(frozen=True)
class Layer(Structure):
    """Whole attention or feed-forward sub-blocks, all heads or neurons of one; its output bias, a constant, stays.

    They compete with each other over the model: of one sub-block alone no fraction can be removed.
    """

    kinds = ("attention", "feed_forward")

    def own_selection(self) -> Selection:
        return Global()

    def part(self, axis: int, size: int) -> Lines:
        return Lines(axis, 0)
