"""Each weight by itself (unstructured)."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import PATTERNS
from .base import Pattern, Reduce, Shape


@PATTERNS.register("element")
@dataclasses.dataclass(frozen=True)
class Element(Pattern):
    """Every weight is its own group; fits tensors of any shape.

    Example:
        >>> Element().groups_shape((3, 4))
        (3, 4)
    """

    @property
    def inputs(self) -> int:
        return 1

    def check(self, shape: Shape, where: str) -> None:
        return

    def groups_shape(self, shape: Shape) -> Shape:
        return tuple(shape)

    def divides(self, rows: int) -> bool:
        return True

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        return scores

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        return kept
