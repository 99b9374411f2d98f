"""A pattern on a weight that is stored as `(in, out)`, as `Conv1D` of GPT-2 does."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..selection import Selection
from .base import Pattern, Reduce, Shape


@dataclasses.dataclass(frozen=True)
class Transposed(Pattern):
    """Groups of another pattern, which sees the weight as `(out, in)`; not for a recipe to name.

    Args:
        inner: the pattern. Scores of groups, and which are kept, are those of `(out, in)`.

    Example:
        >>> import torch
        >>> from hf_sparse.pruning.patterns import Row
        >>> Transposed(Row()).pool(torch.tensor([[1.0, 5.0], [3.0, 7.0]])).tolist()
        [2.0, 6.0]
    """

    inner: Pattern
    name: ClassVar[str] = "transposed"

    def __str__(self) -> str:
        return str(self.inner)

    @property
    def fixed_sparsity(self) -> float | None:
        return self.inner.fixed_sparsity

    def own_selection(self) -> Selection | None:
        return self.inner.own_selection()

    def check(self, shape: Shape, where: str) -> None:
        self.inner.check(shape[::-1], where)

    def groups_shape(self, shape: Shape) -> Shape:
        return self.inner.groups_shape(shape[::-1])

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        return self.inner.pool(scores.t(), reduce)

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        return self.inner.expand(kept, shape[::-1]).t()
