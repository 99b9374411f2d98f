"""Neurons leave in whole blocks of rows, where the zeros of a feed-forward sub-block are in such blocks.

Weights that were pruned in blocks of 4 x 1 have the same columns in each four rows, and kernels load an input once for
all four. A neuron that is zero by chance takes one row with it: those behind it move up, and share no columns any more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..modeling.architectures import SubBlock
from ..modeling.layer_kinds import oriented

logger = logging.getLogger(__name__)

HEIGHTS = (16, 8, 4, 2)
"""Rows of a block, the tallest first."""

MIN_ZEROS = 0.1
"""Fraction of zeros from which a weight counts as pruned."""

MOST_KEPT = 0.25
"""Fraction of the neurons above which those in blocks with others leave too: single rows then cost less than these."""


def height_of(zeros: Tensor, living: Tensor) -> int:
    """Return the rows of the tallest blocks that share their zero columns; 1 if rows do not, or all rows do.

    Args:
        zeros: which entries are zero.
        living: rows that are looked at.

    Shapes:
        zeros: (rows, columns). living: (rows,).

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
        >>> height_of(weight == 0, torch.ones(4, dtype=torch.bool))
        2
    """
    rows = zeros[living]
    if not len(rows) or rows.float().mean() < MIN_ZEROS or bool((rows == rows[0]).all()):
        return 1
    for height in HEIGHTS:
        missing = -len(living) % height
        alive = pad(living, (0, missing)).view(-1, height)
        grouped = pad(zeros, (0, 0, 0, missing)).view(-1, height, zeros.shape[1])
        several = alive.sum(1) > 1
        alive, grouped = alive[several][..., None], grouped[several]
        if len(grouped) and torch.equal((grouped & alive).any(1), (grouped | ~alive).all(1)):
            return height
    return 1


class KeptRows(NamedTuple):
    """What became of the blocks of rows of a sub-block.

    Attributes:
        stay: neurons that contribute nothing, and stay for the others in their block.
        broken: neurons that leave from a block in which others stay.
        height: rows of a block.
    """

    stay: int
    broken: int
    height: int


@torch.no_grad()
def in_row_blocks(block: SubBlock, living: Tensor) -> tuple[Tensor, KeptRows]:
    """Return which neurons of a feed-forward sub-block stay.

    Where some stay that contribute nothing, the output layer reads zeros of them: what they add as a constant is in its
    bias already.

    Args:
        living: which neurons contribute.
    """
    height = max(height_of((part.weights() == 0).flatten(1), living) for part in block.parts)
    whole = pad(living, (0, -len(living) % height)).view(-1, height).any(1).repeat_interleave(height)[: len(living)]
    kept = whole & ~living
    count = int(kept.sum())
    if count > MOST_KEPT * len(living):
        return living, KeptRows(0, count, height)
    if count:
        oriented(block.output, block.output.weight.detach())[:, kept] = 0
    return whole, KeptRows(count, 0, height)


def report_kept(kept: Sequence[KeptRows]) -> None:
    """Say once how many neurons of a model stay for their blocks, or leave from them."""
    stay, broken = sum(each.stay for each in kept), sum(each.broken for each in kept)
    if stay:
        height = max(each.height for each in kept if each.stay)
        logger.warning(
            f"compact(): {stay} neurons that contribute nothing stay, because others in their block of {height} rows "
            "do: without them, rows would move, and kernels for blocks of rows could not be used"
        )
    if broken:
        height = max(each.height for each in kept if each.broken)
        logger.warning(
            f"compact(): {broken} neurons left from blocks of {height} rows in which others stay, so rows share no "
            "columns any more, and kernels for blocks of rows cannot be used: compact before pruning in blocks"
        )
