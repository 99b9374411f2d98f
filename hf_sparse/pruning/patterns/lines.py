"""Lines of a weight: runs of rows, columns or slices of another dimension, which other patterns consist of."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import Pattern, Reduce, Shape


@dataclasses.dataclass(frozen=True)
class Lines(Pattern):
    """Groups of consecutive rows or columns: the part that one weight has in the groups of a structure.

    Args:
        axis: of the weight; of a matrix, 0 = rows (outputs), 1 = columns (inputs).
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

    def divides(self, rows: int) -> bool:
        return self.axis == 0 and self.size > 0 and rows % self.size == 0

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        groups = scores.movedim(self.axis, 0).reshape(*self.groups_shape(tuple(scores.shape)), -1)
        return groups.mean(1) if reduce == "mean" else groups.sum(1)

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        return _along(kept.repeat_interleave(self._size(shape)), self.axis, shape)


@dataclasses.dataclass(frozen=True)
class AssignedLines(Pattern):
    """Groups of any rows or columns: parts of a fused projection, or heads that read one KV head.

    Args:
        axis: dimension of the weight that has the lines.
        groups: number of groups.
        owners: the group of each line; -1 = of none, and never masked.

    Example:
        >>> import torch
        >>> pattern = AssignedLines(axis=0, groups=2, owners=(0, 1, -1, 0))
        >>> pattern.pool(torch.tensor([[1.0], [3.0], [9.0], [2.0]]), "sum").tolist()
        [3.0, 3.0]
        >>> pattern.expand(torch.tensor([False, True]), (4, 1)).flatten().tolist()
        [False, True, True, False]
    """

    axis: int
    groups: int
    owners: tuple[int, ...]
    name: ClassVar[str] = "lines"

    def groups_shape(self, shape: Shape) -> Shape:
        return (self.groups,)

    def _owners(self, device: torch.device) -> Tensor:
        return torch.tensor(self.owners, device=device)

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        sums = scores.movedim(self.axis, 0).flatten(1).sum(1)
        # One more group, for what belongs to none.
        owners = self._owners(scores.device)
        totals = sums.new_zeros(self.groups + 1).index_add_(0, owners % (self.groups + 1), sums)[:-1]
        return totals / self.entries(tuple(scores.shape), scores.device) if reduce == "mean" else totals

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        lines = torch.cat([kept, kept.new_ones(1)])[self._owners(kept.device)]
        return _along(lines, self.axis, shape)

    def entries(self, shape: Shape, device: torch.device) -> Tensor:
        """Return how many entries of a weight of this shape each group has."""
        owners = self._owners(device)
        counts = torch.bincount(owners % (self.groups + 1), minlength=self.groups + 1)[:-1]
        return counts * (math.prod(shape) // max(1, shape[self.axis]))


def _along(lines: Tensor, axis: int, shape: Shape) -> Tensor:
    """Return flags of the lines of one dimension, as a mask of the whole shape."""
    return lines.view([-1 if each == axis else 1 for each in range(len(shape))]).expand(shape)
