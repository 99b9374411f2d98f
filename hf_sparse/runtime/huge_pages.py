"""Packed weights lie side by side in huge pages, where the system has them (Linux).

A matmul of a few tokens reads each weight once, so that its time is that of memory; and where a page has 4 KiB, much of
that goes to finding pages (two levels of tables in a virtual machine). Small allocations cannot have huge pages: the
weights of one layer often take less than one of 2 MiB.
"""

from __future__ import annotations

import contextlib
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

    block: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    used: int = 0

    def take(self, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Return copies; of tensors that are empty or not on the CPU, themselves."""
        return tuple(self._copy(each) if each.is_cpu and each.numel() else each for each in tensors)

    def _copy(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        if size > self.block.numel() - self.used:
            self.block, self.used = _reserve(max(size, BLOCK)), 0
        copied = self.block[self.used : self.used + size].view(tensor.dtype).view(tensor.shape)
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return copied.copy_(tensor)


def _reserve(size: int) -> Tensor:
    """Return bytes that are zero, in huge pages if there are any."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # another system than Linux
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    # Private: a forked process must not write into the weights of this one.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
