"""Connectivity that is chosen once, by a seed: the baseline for every mask that looks at weights or data."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ...config.sparsity import PATTERNS
from ...errors import RecipeError
from ..selection.base import Selection
from ..selection.connectivity import Connectivity, Kind
from .base import Shape
from .element import Element


@dataclasses.dataclass(frozen=True)
class StaticElement(Element):
    """Base: entries by themselves, of which scores decide nothing.

    Args:
        seed: of the draw.
    """

    kind: ClassVar[Kind]
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 62:
            raise RecipeError(f"`seed` must be an integer in [0, 2**62), got {self.seed!r}")

    def __str__(self) -> str:
        return self.kind

    def own_selection(self) -> Selection:
        return Connectivity(self.kind, self.seed)

    def check(self, shape: Shape, where: str) -> None:
        super(Element, self).check(shape, where)  # rows and columns are needed


@PATTERNS.register("expander")
@dataclasses.dataclass(frozen=True)
class Expander(StaticElement):
    """Random shifts of a cycle: all outputs have as many inputs, and all inputs as many outputs.

    Such a graph expands well with a few times log2(inputs) inputs for each output.

    Example:
        >>> import torch
        >>> mask = Expander(seed=1).own_selection().select([torch.zeros(8, 8)], 0.75)[0]
        >>> mask.sum(0).tolist(), mask.sum(1).tolist()
        ([2, 2, 2, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2, 2, 2])

    Source: Prabhu et al. 2018, "Deep Expander Networks: Efficient Deep Networks from Graph Theory", section 3; Alon and
    Roichman 1994, "Random Cayley Graphs and Expanders".
    """

    kind = "expander"


@PATTERNS.register("radix")
@dataclasses.dataclass(frozen=True)
class Radix(StaticElement):
    """Equally spaced inputs, the same shifts for every output; nothing is random, and the seed has no effect.

    Source: Kepner and Robinett 2019, "RadiX-Net: Structured Sparse Matrices for Deep Neural Networks", section III.
    """

    kind = "radix"


@PATTERNS.register("random")
@dataclasses.dataclass(frozen=True)
class RandomFanIn(StaticElement):
    """Random inputs, as many for each output; inputs have different numbers of outputs.

    Source: Prabhu et al. 2018, section 3.1 (X-Linear).
    """

    kind = "random"
