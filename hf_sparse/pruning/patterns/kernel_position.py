"""Positions of the kernel of a convolution."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import PATTERNS
from ...errors import PatternError
from ...utils.validation import check_bool
from .base import Pattern, Reduce, Shape


@PATTERNS.register("kernel_position")
@dataclasses.dataclass(frozen=True)
class KernelPosition(Pattern):
    """Each position of the kernel of a convolution, through all filters and channels: 9 groups for 3 x 3.

    Args:
        by_filter: each filter has positions of its own ("stripes").

    Source: Meng et al. 2020, "Pruning Filter in Filter", section 3.1 (stripes).
    """

    by_filter: bool = False

    def __post_init__(self) -> None:
        check_bool("by_filter", self.by_filter)

    def __str__(self) -> str:
        return self.name

    def for_kernel(self, kernel: int) -> Pattern:
        return self if kernel == 1 else Positions(kernel, self.by_filter)

    def check(self, shape: Shape, where: str) -> None:
        super().check(shape, where)
        raise PatternError(
            f"pattern {self.name} needs a convolution with a kernel of several positions, and '{where}' has one. "
            f'Exclude it with exclude: "{where.removesuffix(".weight")}" or use pattern column'
        )


@dataclasses.dataclass(frozen=True)
class Positions(Pattern):
    """Columns that are the same position of the kernels of all channels.

    Args:
        kernel: positions of a kernel.
        by_filter: see `KernelPosition`.

    Example:
        >>> import torch
        >>> Positions(2).pool(torch.tensor([[1.0, 5.0, 3.0, 7.0]])).tolist()
        [2.0, 6.0]
        >>> Positions(2).expand(torch.tensor([False, True]), (1, 4)).tolist()
        [[False, True, False, True]]
    """

    kernel: int
    by_filter: bool = False
    name = "kernel_position"

    def __str__(self) -> str:
        return self.name

    def groups_shape(self, shape: Shape) -> Shape:
        return (shape[0], self.kernel) if self.by_filter else (self.kernel,)

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        kernels = scores.reshape(scores.shape[0], -1, self.kernel)
        axes = (1,) if self.by_filter else (0, 1)
        return kernels.mean(axes) if reduce == "mean" else kernels.sum(axes)

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        positions = kept.view(-1, 1, self.kernel)
        return positions.expand(shape[0], shape[1] // self.kernel, self.kernel).reshape(shape)
