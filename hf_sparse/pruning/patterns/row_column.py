"""Rows (outputs) or columns (inputs) of a weight."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import PATTERNS
from .base import Pattern, Reduce, Shape
from .lines import Lines


@PATTERNS.register("row")
@dataclasses.dataclass(frozen=True)
class Row(Pattern):
    """Each output: one row of the weight, of a convolution one filter. The bias is left alone.

    Example:
        >>> import torch
        >>> Row().expand(torch.tensor([True, False]), (2, 3)).tolist()
        [[True, True, True], [False, False, False]]
    """

    def groups_shape(self, shape: Shape) -> Shape:
        return (shape[0],)

    def divides(self, rows: int) -> bool:
        return True

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        return scores.mean(1) if reduce == "mean" else scores.sum(1)

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        return kept[:, None].expand(shape)


@PATTERNS.register("column")
@dataclasses.dataclass(frozen=True)
class Column(Pattern):
    """Each input: one column of the weight, of a convolution one input channel with all positions of the kernel.

    Example:
        >>> import torch
        >>> Column().expand(torch.tensor([True, False]), (2, 2)).tolist()
        [[True, False], [True, False]]
    """

    def for_kernel(self, kernel: int) -> Pattern:
        return self if kernel == 1 else Lines(axis=1, size=kernel)

    def groups_shape(self, shape: Shape) -> Shape:
        return (shape[1],)

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        return scores.mean(0) if reduce == "mean" else scores.sum(0)

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        return kept[None, :].expand(shape)
