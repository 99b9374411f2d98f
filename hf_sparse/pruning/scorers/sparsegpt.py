"""Optimal brain surgeon, column by column: what is kept makes up for what is removed."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import ClassVar

import torch
from torch import Tensor

from ...config.sparsity import SCORERS
from ...errors import RecipeError, SparsityError
from ...modeling.value_grid import GRIDS, NOTHING, ValueGrid
from ...utils.validation import check_number, check_one_of, check_positive_int
from ..calibrated.statistics import InputStatistics
from ..patterns import NM, OnMatrix
from .inputs import Choice, InputScorer

logger = logging.getLogger(__name__)

_RETRIES = 4
"""How often the damping is raised tenfold where the inputs are too dependent on each other for float32."""


@SCORERS.register("sparsegpt")
@dataclasses.dataclass
class SparseGPT(InputScorer):
    """Remove weights by `w² / [U]_jj²` and let the columns behind make up for each, `U` the Cholesky factor of `H⁻¹`.

    `H = 2/n sum x xᵀ` over the inputs of the layer. Columns are taken from the first to the last, in blocks: which
    entries of a block are removed is chosen when it is reached, from its updated values; with n:m, when each m columns
    are reached. Inputs that are always zero have their weights removed. In one shot only, see `hf_sparse.sparsify`.

    With `bits`, what is kept is rounded too when its column is reached, and the columns behind make up for both. The
    values are those of a kernel of the runtime, which then packs them without a loss: "bitmask-int8" or
    "bitmask-int4". Scales have so few binary digits that bfloat16 holds every value; they come from the largest value
    of their columns when the first of these is reached. What rounds to zero is removed. Columns whose kept values are
    all below 1e-30, for which no kernel has a scale, are not rounded, and that is said.

    Args:
        damping: of the mean of the diagonal of `H`, added to it.
        block: columns among which entries compete, over all rows; rounded up to whole groups of the pattern, and of
            columns that share a scale.
        bits: of the values that are kept, 4 or 8; None = they are not rounded.

    Source: Frantar and Alistarh 2023, "SparseGPT", algorithm 1 and sections 3 and 3.5 (joint quantization).
    """

    needs_products: ClassVar[bool] = True
    damping: float = 0.01
    block: int = 128
    bits: int | None = None

    def __post_init__(self) -> None:
        check_number("damping", self.damping, "(0, inf)")
        check_positive_int("block", self.block)
        if self.bits is not None:
            check_one_of("bits", self.bits, tuple(GRIDS))

    @property
    def grid(self) -> ValueGrid | None:
        """The grid of the values that are kept."""
        return None if self.bits is None else GRIDS[self.bits]

    def check_reconstruction(self) -> None:
        if self.bits is not None:
            raise RecipeError(
                f"scorer 'sparsegpt' with bits={self.bits} leaves values that a kernel holds exactly, and a "
                "reconstruction would change them. Leave out one of the two"
            )

    def prune(self, weight: Tensor, inputs: InputStatistics, choice: Choice) -> tuple[Tensor, Tensor]:
        hessian = inputs.hessian()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1.0
        factor = _inverse_factor(hessian, self.damping)
        del hessian
        weight = weight.masked_fill(dead, 0.0)
        kept = torch.ones_like(weight, dtype=torch.bool)
        pattern = choice.pattern.inner if isinstance(choice.pattern, OnMatrix) else choice.pattern
        together = math.lcm(pattern.inputs or 1, 1 if self.grid is None else self.grid.group)
        width = -(-self.block // together) * together
        step = (pattern.inputs or 1) if isinstance(pattern, NM) else width
        tiny = 0
        for start in range(0, weight.shape[1], width):
            columns = slice(start, start + width)
            part = _Block(weight[:, columns], factor[columns, columns], choice, step, self.grid)
            errors, kept[:, columns] = part.prune()
            weight[:, start + width :].addmm_(errors.t(), factor[columns, start + width :], alpha=-1)
            tiny += int((part.unscaled & ~part.removed).sum())
        if tiny:
            logger.warning(
                f"scorer 'sparsegpt' with bits={self.bits} leaves {tiny} of {weight.numel()} weights of a layer as "
                f"they are, not rounded: all that is kept of the columns of their scale is below {NOTHING:g}, where "
                "kernels have no scale and compute with zeros"
            )
        return weight, kept


class _Block:
    """Some columns that are pruned together.

    Args:
        weight: `(out, columns)`, changed in place.
        factor: `U` of these columns.
        step: columns that are chosen from at a time, when they are reached.
        grid: that values are rounded to.

    Attributes:
        unscaled: `(columns, out)`, where no kernel has a scale, so that nothing is rounded.
    """

    def __init__(self, weight: Tensor, factor: Tensor, choice: Choice, step: int, grid: ValueGrid | None) -> None:
        self.weight, self.factor, self.choice, self.step, self.grid = weight, factor, choice, step, grid
        self.rows = weight.t().contiguous()  # one row for each column, so that each is in one piece
        self.removed = torch.zeros_like(self.rows, dtype=torch.bool)
        self.unscaled = torch.zeros_like(self.removed)

    def prune(self) -> tuple[Tensor, Tensor]:
        """Return the errors `(columns, out)`, and which entries are kept, `(out, columns)`."""
        rows, factor, diagonal = self.rows, self.factor, self.factor.diagonal()
        errors, scales = torch.zeros_like(rows), None
        for column in range(len(rows)):
            if column % self.step == 0:
                group = slice(column, column + self.step)
                self.removed[group] = ~self.choice((rows[group] / diagonal[group, None]).square().t()).t()
            if self.grid is not None and column % self.grid.group == 0:
                scales = self._scales(self.grid, column)
                self.unscaled[column : column + self.grid.group] = scales == 0
            value = rows[column].masked_fill(self.removed[column], 0.0)
            if self.grid is not None and scales is not None:
                value = torch.where(scales > 0, self.grid.steps_of(value, scales) * scales, value)
                self.removed[column] |= value == 0
            errors[column] = (rows[column] - value) / diagonal[column]
            rows[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
            rows[column] = value
        self.weight.copy_(rows.t())
        return errors, ~self.removed.t()

    def _scales(self, grid: ValueGrid, column: int) -> Tensor:
        """Return what a step is worth in the columns of one scale, for each output."""
        group = slice(column, column + grid.group)
        largest = self.rows[group].masked_fill(self.removed[group], 0.0)
        return grid.scale_of(largest.t(), grid.exact_digits).squeeze(1)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper `U` with `UᵀU = (H + damping mean(diag H))⁻¹`; the Hessian is overwritten.

    With `H = R Rᵀ` and R upper, U is the inverse of R. R is a Cholesky factor of H with rows and columns in reverse
    order, so one factorization does it, and H is never inverted.

    Raises:
        SparsityError: if H is not positive definite even with much damping.
    """
    size, added = float(hessian.diagonal().mean()) * damping, 0.0
    for attempt in range(_RETRIES):
        hessian.diagonal().add_(size * 10.0**attempt - added)
        added = size * 10.0**attempt
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not int(failed):
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        logger.warning(
            "the inputs of a layer depend on each other so much that their products cannot be factored in "
            f"{str(hessian.dtype).removeprefix('torch.')}: the damping is {damping * 10.0 ** (attempt + 1):g} there"
        )
    raise SparsityError(
        f"the products of the inputs are not positive definite, even with damping {damping * 10.0**_RETRIES:g}. Are "
        "there NaN among the weights that were loaded?"
    )
