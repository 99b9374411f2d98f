"""Grids of rounded weights: whole steps of a scale that some columns of an output row share.

Kernels that round read weights on a grid (bitmask_int8, bitmask_int4); SparseGPT with `bits` leaves weights on it. A
weight that is on the grid is found to be, whatever its scales are, and is packed without a loss.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = 1e-30
"""Columns of one scale whose numbers are all smaller count as zeros."""

_GLANCE = 16
"""Columns of a scale that are looked at first, since most weights are on no grid."""


@dataclasses.dataclass(frozen=True)
class ValueGrid:
    """Steps from `-steps` to `steps` of a scale that each output row has for `group` columns.

    Attributes:
        bits: of a value that is not zero, in the kernel.
        group: columns that share a scale.
        steps: from zero to the largest value. A zero takes no value, so that 4 bits have 8 steps to either side.
        digits: binary digits that the kernel keeps of a scale.
        exact_digits: of a scale, so that bfloat16 holds its product with any number of steps.
    """

    bits: int
    group: int
    steps: int
    digits: int
    exact_digits: int

    @property
    def error(self) -> float:
        """Largest error of a value, as a fraction of the largest of its columns."""
        return 0.5 / self.steps * (1 + 2.0 ** (1 - self.digits))

    def grouped(self, weight: Tensor) -> Tensor:
        """Return the columns group by group, the last one filled with zeros: (..., in) -> (..., groups, `group`)."""
        groups = -(-weight.shape[-1] // self.group)
        return F.pad(weight, (0, groups * self.group - weight.shape[-1])).unflatten(-1, (groups, self.group))

    def scales(self, grouped: Tensor) -> Tensor:
        """Return what a step is worth: that of the grid that the values are on, else the largest value / `steps`.

        Shapes: (..., `group`) -> (..., 1)

        Example:
            >>> GRIDS[4].scales(torch.tensor([[0.375, -0.625, 0.0], [1.0, 0.3, 0.0]])).tolist()
            [[0.125], [0.125]]
        """
        found = self._divisor(grouped)
        return torch.where(found > 0, found, self.scale_of(grouped, self.digits))

    def scale_of(self, grouped: Tensor, digits: int) -> Tensor:
        """Return the largest value / `steps`, rounded up to some binary digits; zero if that counts as nothing."""
        largest = grouped.abs().amax(-1, keepdim=True)
        return torch.where(largest < NOTHING, 0.0, shortened(largest / self.steps, digits))

    def steps_of(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the nearest steps, as whole numbers in the type of the values."""
        return torch.where(scales > 0, values / scales, 0.0).round().clamp_(-self.steps, self.steps)

    def _divisor(self, grouped: Tensor) -> Tensor:
        """Return the greatest number of which all values of a group are few enough multiples; zero without one."""
        out = grouped.new_zeros((*grouped.shape[:-1], 1))
        size = grouped.abs().double()
        largest = size.amax(-1, keepdim=True)
        smallest = torch.where(size > 0, size, torch.inf).amin(-1, keepdim=True)
        likely = ((largest >= NOTHING) & (largest <= smallest * self.steps)).squeeze(-1)
        # In units of the last digit that a float32 of the size of the smallest value has: whole numbers.
        unit = _power_below(smallest[likely]) / 2.0**23
        units, most = size[likely] / unit, largest[likely] / unit
        for columns in (_GLANCE, self.group):
            divisor = _common_divisor(units[:, :columns])
            left = ((divisor == 0) | (divisor * self.steps >= most)).squeeze(-1)
            likely[likely.clone()] = left
            unit, units, most, divisor = unit[left], units[left], most[left], divisor[left]
        scale = (divisor * unit).to(grouped.dtype)
        out[likely] = torch.where(shortened(scale, self.digits) == scale, scale, 0.0)
        return out


GRIDS = {
    8: ValueGrid(bits=8, group=128, steps=127, digits=24, exact_digits=1),
    4: ValueGrid(bits=4, group=64, steps=8, digits=8, exact_digits=5),
}
"""By the bits of a value: the grids of the kernels "bitmask-int8" and "bitmask-int4"."""


def shortened(values: Tensor, digits: int) -> Tensor:
    """Return numbers >= 0, in float32 or float64, rounded up to as many binary digits.

    Example:
        >>> shortened(torch.tensor([0.3, 0.25, 5.0]), 1).tolist()
        [0.5, 0.25, 8.0]
    """
    kind, all_digits = (torch.int64, 53) if values.dtype == torch.float64 else (torch.int32, 24)
    cut = max(0, all_digits - digits)
    return (((values.contiguous().view(kind) + ((1 << cut) - 1)) >> cut) << cut).view(values.dtype)


def _power_below(values: Tensor) -> Tensor:
    """Return the powers of two up to float64 numbers > 0."""
    return ((values.contiguous().view(torch.int64) >> 52) << 52).view(torch.float64)


def _common_divisor(units: Tensor) -> Tensor:
    """Return the greatest common divisor of each row; zero of zeros alone. Numbers with a fraction have that of 1."""
    whole = torch.where(units == units.floor(), units, 1.0).to(torch.int64)
    while whole.shape[-1] > 1:
        half = -(-whole.shape[-1] // 2)
        whole = torch.gcd(whole[:, :half], F.pad(whole[:, half:], (0, 2 * half - whole.shape[-1])))
    return whole.double()
