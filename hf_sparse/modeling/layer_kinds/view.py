"""A weight of any number of dimensions as a matrix: a row for each output, a column for each of its inputs."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """How a weight becomes a matrix, and a matrix that weight.

    Args:
        shape: of the weight as it is stored.
        order: its dimensions in the order of the matrix: those of the outputs first.
        rows: how many of them are of the outputs.
        kernel: columns of each input channel, side by side: the positions of a convolution kernel.
        split: `shape` with some dimensions divided in two, which `order` counts then; () = none is.

    Example:
        >>> import torch
        >>> view = MatrixView((2, 3, 1, 2), (0, 1, 2, 3), rows=1, kernel=2)  # a convolution: 2 filters, 3 channels
        >>> view.matrix_shape
        (2, 6)
        >>> weight = torch.arange(12).view(2, 3, 1, 2)
        >>> torch.equal(view.to_stored(view.to_matrix(weight)), weight)
        True
    """

    shape: tuple[int, ...]
    order: tuple[int, ...] = (0, 1)
    rows: int = 1
    kernel: int = 1
    split: tuple[int, ...] = ()

    @property
    def _sizes(self) -> tuple[int, ...]:
        divided = self.split or self.shape
        return tuple(divided[axis] for axis in self.order)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return math.prod(self._sizes[: self.rows]), math.prod(self._sizes[self.rows :])

    @property
    def is_plain(self) -> bool:
        """Whether the weight is that matrix already."""
        return self.order == (0, 1)

    def to_matrix(self, values: Tensor) -> Tensor:
        """Return a tensor of the shape of the weight as a matrix; a view where there is one."""
        if self.is_plain:
            return values
        divided = values.reshape(self.split) if self.split else values
        return _shaped(divided.permute(self.order), self.matrix_shape)

    def to_stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix in the shape of the weight; a view where there is one."""
        if self.is_plain:
            return matrix
        inverse = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return _shaped(_shaped(matrix, self._sizes).permute(inverse), self.shape)


def _shaped(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values if tuple(values.shape) == shape else values.reshape(shape)
