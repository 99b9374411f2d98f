"""Optimal brain surgeon, column by column: what is kept makes up for what is removed."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import torch
from torch import Tensor

from ...config.sparsity import SCORERS
from ...errors import SparsityError
from ...utils.validation import check_number, check_positive_int
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

    Args:
        damping: of the mean of the diagonal of `H`, added to it.
        block: columns among which entries compete, over all rows; rounded up to whole groups of the pattern.

    Source: Frantar and Alistarh 2023, "SparseGPT", algorithm 1 and section 3.
    """

    needs_products: ClassVar[bool] = True
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        check_number("damping", self.damping, "(0, inf)")
        check_positive_int("block", self.block)

    def prune(self, weight: Tensor, inputs: InputStatistics, choice: Choice) -> tuple[Tensor, Tensor]:
        hessian = inputs.hessian()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1.0
        factor = _inverse_factor(hessian, self.damping)
        del hessian
        weight = weight.masked_fill(dead, 0.0)
        kept = torch.ones_like(weight, dtype=torch.bool)
        pattern = choice.pattern.inner if isinstance(choice.pattern, OnMatrix) else choice.pattern
        together = pattern.inputs or 1
        width = -(-self.block // together) * together
        step = together if isinstance(pattern, NM) else width
        for start in range(0, weight.shape[1], width):
            columns = slice(start, start + width)
            errors, kept[:, columns] = _prune_block(weight[:, columns], factor[columns, columns], choice, step)
            weight[:, start + width :].addmm_(errors.t(), factor[columns, start + width :], alpha=-1)
        return weight, kept


def _prune_block(weight: Tensor, factor: Tensor, choice: Choice, step: int) -> tuple[Tensor, Tensor]:
    """Prune some columns in place, and return their errors `(columns, out)` and which entries are kept.

    Args:
        weight: `(out, columns)`.
        factor: `U` of these columns.
        step: columns that are chosen from at a time, when they are reached.
    """
    rows = weight.t().contiguous()  # one row for each column, so that each is in one piece
    errors, diagonal = torch.zeros_like(rows), factor.diagonal()
    kept = torch.ones_like(weight, dtype=torch.bool)
    removed = torch.zeros_like(rows, dtype=torch.bool)
    for column in range(len(rows)):
        if column % step == 0:
            group = slice(column, column + step)
            kept[:, group] = choice((rows[group] / diagonal[group, None]).square().t())
            removed[group] = ~kept[:, group].t()
        errors[column] = torch.where(removed[column], rows[column] / diagonal[column], 0.0)
        rows[column:].addr_(factor[column, column:], errors[column], alpha=-1)
    weight.copy_(rows.t())
    return errors, kept


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
