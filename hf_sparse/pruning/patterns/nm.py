"""n of every m consecutive inputs (2:4 and its variants)."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...config.sparsity import PATTERNS
from ...errors import RecipeError
from ..selection import Selection, WithinInputs
from .base import Pattern, Reduce, Shape


@PATTERNS.register("n:m")
@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """Keep n of every m consecutive weights along the inputs; written "2:4", "4:8", ... for short.

    The sparsity is always `1 - n/m`. On the way there, a schedule passes through m-1:m, m-2:m, ...

    Args:
        n: weights kept of every m.
        m: weights compared with each other.

    Raises:
        PatternError: for a weight whose input dimension is not a multiple of m.

    Example:
        >>> NM(2, 4).fixed_sparsity
        0.5

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3.1.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not (type(self.n) is int and type(self.m) is int and 1 <= self.n < self.m):
            raise RecipeError(f"pattern n:m: `n` and `m` must be integers with 1 <= n < m, got {self.n!r}:{self.m!r}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def inputs(self) -> int:
        return self.m

    @property
    def fixed_sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def own_selection(self) -> Selection:
        return WithinInputs(self.n, self.m)

    def check(self, shape: Shape, where: str) -> None:
        super().check(shape, where)
        self._fits("input", shape[1], self.m, shape, where)

    def groups_shape(self, shape: Shape) -> Shape:
        return tuple(shape)

    def divides(self, rows: int) -> bool:
        return True

    def pool(self, scores: Tensor, reduce: Reduce = "mean") -> Tensor:
        return scores

    def expand(self, kept: Tensor, shape: Shape) -> Tensor:
        return kept


PATTERNS.shorthand(
    r"(\d{1,4}):(\d{1,4})",
    lambda match: {"name": "n:m", "n": int(match[1]), "m": int(match[2])},
    example="'2:4' (2 of every 4 inputs stay)",
)
