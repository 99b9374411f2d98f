"""A pattern on a weight that is not stored as the matrix `(out, in)`: convolutions, `Conv1D` of GPT-2, experts."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ...modeling.layer_kinds import MatrixView
from ..selection import Selection
from .base import Pattern, Reduce, Shape


@dataclasses.dataclass(frozen=True)
class OnMatrix(Pattern):
    """Groups of another pattern, which sees the weight as a matrix; not for a recipe to name.

    Args:
        stated: the requested pattern. Scores of groups, and which are kept, are those of the matrix.
        view: the weight as a matrix.

    Example:
        >>> import torch
        >>> from hf_sparse.pruning.patterns import Row
        >>> OnMatrix(Row(), MatrixView((2, 2), (1, 0))).pool(torch.tensor([[1.0, 5.0], [3.0, 7.0]])).tolist()
        [2.0, 6.0]
    """

    stated: Pattern
    view: MatrixView
    name: ClassVar[str] = "on_matrix"

    def __str__(self) -> str:
        return str(self.stated)

    @property
    def inner(self) -> Pattern:
        """The pattern of the matrix."""
        return self.stated.for_kernel(self.view.kernel)

    @property
    def fixed_sparsity(self) -> float | None:
        return self.inner.fixed_sparsity

    def own_selection(self) -> Selection | None:
        return self.inner.own_selection()

    def check(self, shape: Shape, where: str) -> None:
        self.inner.check(self.view.matrix_shape, where)

    def groups_shape(self, shape: Shape) -> Shape:
        return self.inner.groups_shape(self.view.matrix_shape)

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        return self.inner.pool(self.view.to_matrix(scores), reduce)

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        return self.view.to_stored(self.inner.expand(kept, self.view.matrix_shape))
