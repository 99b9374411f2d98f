"""Rectangles of weights."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import PATTERNS
from ...utils.validation import check_positive_int
from .base import Pattern, Reduce, Shape


@PATTERNS.register("block")
@dataclasses.dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `rows` outputs x `cols` inputs, aligned to the corner of the weight; written "4x1", "32x32" for short.

    Args:
        rows: outputs in a block.
        cols: inputs in a block.

    Raises:
        PatternError: for a weight whose shape is not a multiple of the block.

    Example:
        >>> import torch
        >>> Block(rows=2, cols=2).pool(torch.arange(8.0).view(2, 4)).tolist()
        [[2.5, 4.5]]

    Source: Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 3.
    """

    rows: int = 32
    cols: int = 32

    def __post_init__(self) -> None:
        for key in ("rows", "cols"):
            check_positive_int(key, getattr(self, key))

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols}"

    @property
    def inputs(self) -> int:
        return self.cols

    def check(self, shape: Shape, where: str) -> None:
        super().check(shape, where)
        self._fits("output", shape[0], self.rows, shape, where)
        self._fits("input", shape[1], self.cols, shape, where)

    def groups_shape(self, shape: Shape) -> Shape:
        return shape[0] // self.rows, shape[1] // self.cols

    def divides(self, rows: int) -> bool:
        return rows % self.rows == 0

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        height, width = self.groups_shape(tuple(scores.shape))
        blocks = scores.reshape(height, self.rows, width, self.cols)
        # First along the contiguous inputs, then over the much smaller rest: faster than both at once.
        return blocks.mean(3).mean(1) if reduce == "mean" else blocks.sum(3).sum(1)

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        height, width = self.groups_shape(shape)
        return kept.view(height, 1, width, 1).expand(height, self.rows, width, self.cols).reshape(shape)


PATTERNS.shorthand(
    r"(\d{1,5})x(\d{1,5})",
    lambda match: {"name": "block", "rows": int(match[1]), "cols": int(match[2])},
    example="'4x1' (blocks of 4 outputs x 1 input)",
)
