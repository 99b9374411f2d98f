"""What a pattern is: which entries of a weight form a group, the smallest thing that is kept or removed."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ...errors import PatternError
from ..selection import Selection

Shape = tuple[int, ...]
Reduce = Literal["mean", "sum"]


class Pattern:
    """Base of all patterns. Weights are matrices `(out, in)`, as in `nn.Linear`; others are seen as one (`OnMatrix`).

    Attributes:
        fixed_sparsity: the sparsity that the pattern itself decides (n:m), or None.
        structural: whether a group goes through several weights, which an architecture has to name.
    """

    name: ClassVar[str]
    structural: ClassVar[bool] = False

    @property
    def inputs(self) -> int | None:
        """How many consecutive inputs a choice looks at; None where it looks at whole rows or columns of weights."""
        return None

    @property
    def fixed_sparsity(self) -> float | None:
        return None

    def own_selection(self) -> Selection | None:
        """Return the only selection that makes sense for this pattern, or None if the user may choose."""
        return None

    def multiple(self, kind: str | None) -> int:
        """Return of how many groups a unit keeps a multiple, or all that it has; 1 = any number.

        Args:
            kind: of the unit: "attention", "feed_forward" or "convolution", None for a weight alone.
        """
        return 1

    def check(self, shape: Shape, where: str) -> None:
        """Raise `PatternError` if weights of this shape cannot be divided into groups.

        Args:
            shape: of the weight.
            where: its name, for the message.
        """
        if len(shape) != 2:
            raise PatternError(
                f"pattern {self.name} needs a matrix, but '{where}' has shape {tuple(shape)}. Exclude it with "
                f'exclude: "{where.removesuffix(".weight")}" or use pattern element.'
            )

    def for_kernel(self, kernel: int) -> Pattern:
        """Return the pattern for a matrix in which each input is a channel of `kernel` columns: a convolution."""
        return self

    def groups_shape(self, shape: Shape) -> Shape:
        """Return the shape of the group scores of a weight of this shape."""
        raise NotImplementedError

    def divides(self, rows: int) -> bool:
        """Return whether rows of a weight, taken so many at a time, have whole groups: none spans two parts."""
        return False

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        """Turn scores of entries `(out, in)` into scores of groups, by the mean or the sum of each group."""
        raise NotImplementedError

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        """Turn kept groups into a bool mask of the weight's shape; may be a view of `kept`."""
        raise NotImplementedError

    def _fits(self, what: str, size: int, multiple: int, shape: Shape, where: str) -> None:
        if size % multiple:
            raise PatternError(
                f"pattern {self} needs the {what} dimension to be a multiple of {multiple}, but '{where}' has shape "
                f'{tuple(shape)}. Exclude it with exclude: "{where.removesuffix(".weight")}" or use pattern element.'
            )
