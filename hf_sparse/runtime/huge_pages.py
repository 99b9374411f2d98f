"""Packed weights lie side by side in huge pages, where the system has them (Linux).

A matmul of a few tokens reads each weight once, so that its time is that of memory; and where a page has 4 KiB, much of
that goes to finding pages (two levels of tables in a virtual machine). Small allocations cannot have huge pages: the
weights of one layer often take less than one of 2 MiB.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 1 << 25
"""Bytes that are reserved at a time. What no tensor has reached takes no memory."""

ALIGNMENT = 64
"""Of each tensor: a line of the cache."""


@dataclasses.dataclass
class HugePages:
    """Takes copies of tensors, one after the other. A block is freed with the last tensor in it.

    Example:
        >>> memory = HugePages()
        >>> memory.take([torch.ones(2), torch.zeros(0)])
        (tensor([1., 1.]), tensor([]))
    """

    block: mmap.mmap | None = None
    used: int = 0

    def take(self, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Return copies; where there are no huge pages, and of tensors that are empty or not on the CPU, themselves."""
        return tuple(self._copy(each) if each.is_cpu and each.numel() else each for each in tensors)

    def _copy(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        if self.block is None or size > len(self.block) - self.used:
            block = _reserve(max(size, BLOCK))
            if block is None:
                return tensor
            self.block, self.used = block, 0
        # Each has a storage of its own: torch.save refuses one storage of several types, and saves all of it.
        copied = torch.frombuffer(self.block, dtype=tensor.dtype, count=tensor.numel(), offset=self.used)
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return copied.view(tensor.shape).copy_(tensor)


def _reserve(size: int) -> mmap.mmap | None:
    """Return memory for which huge pages are asked; None where there are none, or no room to reserve so much."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # another system than Linux
        return None
    try:
        # Private: a forked process must not write into the weights of this one.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a limit of the address space; a kernel without huge pages
        return None
    return memory
