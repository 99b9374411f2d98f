"""How long a sub-block takes on this machine, by the number of heads or neurons left. Measured once, then cached.

A table of measured latencies predicts speed better than a count of operations: a layer with a tenth of its neurons is
not ten times faster. (ZipLM and the retraining-free pruning of Kwon et al. spend their budgets by such tables.)
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .machine import CpusOfOthers, machine
from .measurement_cache import MeasurementCache
from .timer import Run, interleave, quartiles

logger = logging.getLogger(__name__)

_ROUNDS = 9
_MIN_SECONDS = 0.0005
_LEVELS = 16
_ATTEMPTS = 3
_MAX_SPREAD = 0.25
"""Upper over lower quartile of the rounds, minus 1, at the middle level: above it the machine was busy."""
_MAX_CROWD = 0.5
"""CPUs that other programs took from torch's threads: above it the machine was busy."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A sub-block, as far as its time depends on it.

    Args:
        kind: "attention" or "feed_forward".
        width: features that go in and come out.
        groups: heads or neurons that it has.
        size: rows of each group in every input layer.
        inputs: number of input layers: 3 of an attention, 1 or 2 of a feed-forward part.
        length: tokens of an example.
        batch: examples in a batch.
    """

    kind: Literal["attention", "feed_forward"]
    width: int
    groups: int
    size: int
    inputs: int
    length: int
    batch: int

    @property
    def levels(self) -> list[int]:
        """Numbers of groups that are timed, from none to all."""
        steps = min(self.groups, _LEVELS)
        return sorted({round(self.groups * step / steps) for step in range(steps + 1)})


Clock = Callable[[Shape, Sequence[int]], Mapping[int, Sequence[float]]]
"""Shape and numbers of groups left -> seconds of each round, by number."""


@torch.no_grad()
def measure(shape: Shape, levels: Sequence[int]) -> dict[int, list[float]]:
    """Time a sub-block with these numbers of groups left, interleaved, on the CPU with torch's threads.

    Returns:
        The time of each round, by number of groups. Units: seconds.
    """
    block = _attention if shape.kind == "attention" else _feed_forward
    x = _randn(shape.batch, shape.length, shape.width)
    # Smaller weights are the beginning of the memory of the largest.
    memory = [_randn(max(levels) * shape.size * shape.width) for _ in range(shape.inputs + 1)]

    def run_of(groups: int) -> Run:
        size = groups * shape.size
        inputs = [flat[: size * shape.width].view(size, shape.width) for flat in memory[:-1]]
        output = memory[-1][: size * shape.width].view(shape.width, size)
        return lambda: block(shape, groups, x, inputs, output)

    rounds = interleave({str(n): run_of(n) for n in levels if n}, _ROUNDS, min_seconds=_MIN_SECONDS)
    return {groups: rounds[str(groups)] if groups else [0.0] for groups in levels}


def _randn(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float32, device="cpu")  # whatever the defaults of torch are


def _attention(shape: Shape, groups: int, x: Tensor, inputs: list[Tensor], output: Tensor) -> Tensor:
    heads = (shape.batch, shape.length, groups, shape.size)
    q, k, v = (F.linear(x, weight).view(heads).transpose(1, 2) for weight in inputs)
    context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape.batch, shape.length, -1)
    return F.linear(context, output)


def _feed_forward(shape: Shape, groups: int, x: Tensor, inputs: list[Tensor], output: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, inputs[0]))
    for gate in inputs[1:]:
        hidden = hidden * F.linear(x, gate)
    return F.linear(hidden, output)


class LatencyTable:
    """Times of shapes on this machine, kept in a file between runs.

    Where other programs disturb the measurement it is repeated. If that does not help, a warning says so, and the times
    are used in this process but not kept.

    Args:
        path: of the file; None = `latency.json` in the folder that HF_SPARSE_CACHE names, or in ~/.cache/hf_sparse.
        clock: what measures.
        others: how many CPUs other programs use while something runs.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        clock: Clock = measure,
        others: Callable[[], CpusOfOthers] = CpusOfOthers,
    ) -> None:
        self.cache = MeasurementCache(path, "latency.json")
        self.clock, self.others = clock, others

    def times(self, shape: Shape) -> Tensor:
        """Return the seconds for each number of groups from 0 to all, measured at some and linear between them.

        Shapes: `(groups + 1,)`, float64, never falling.
        """
        levels = shape.levels

        def valid(entry: list[float]) -> bool:
            return len(entry) == len(levels) + 2 and all(
                time > 0.0 for level, time in zip(levels, entry[:-2], strict=True) if level
            )

        key = f"{machine()}; {dataclasses.astuple(shape)}"
        entry = self.cache.get(key, lambda: self._measured(shape), valid, keep=_is_quiet)
        return _between(levels, entry[:-2])

    def _measured(self, shape: Shape) -> list[float]:
        """Return the time at each level, the spread, and the CPUs that other programs used beyond those left over."""
        entries: list[list[float]] = []
        for _ in range(_ATTEMPTS):
            others = self.others()
            rounds = self.clock(shape, shape.levels)
            crowd = max(0.0, others.stop() + torch.get_num_threads() - (os.cpu_count() or 1))
            # The lower quartile: what disturbs a round only makes it longer.
            each = [quartiles(list(rounds[level])) for level in shape.levels]
            spread = statistics.median([high / max(low, 1e-12) - 1 for low, _, high in each if high] or [0.0])
            entries.append([*(low for low, _, _ in each), spread, crowd])
            if _is_quiet(entries[-1]):
                return entries[-1]
        best = min(entries, key=lambda entry: (entry[-1], entry[-2]))
        logger.warning(
            f"the latency of {shape.kind} blocks was measured on a busy machine: rounds differ by {best[-2]:.0%}, and "
            f"other programs take {best[-1]:.1f} of the CPUs that torch's {torch.get_num_threads()} threads need. A "
            "budget of latency is as inexact as that. The times are not kept: they are measured again by the next "
            "process, which should have the machine for itself"
        )
        return best


def _is_quiet(entry: list[float]) -> bool:
    """Return whether nothing disturbed a measurement much, given its entry in the file."""
    return entry[-2] <= _MAX_SPREAD and entry[-1] <= _MAX_CROWD


def _between(levels: list[int], measured: list[float]) -> Tensor:
    """Interpolate between the levels that were measured; noise must not make fewer groups slower than more.

    Example:
        >>> _between([0, 2, 4], [0.0, 3.0, 2.0]).tolist()
        [0.0, 1.5, 3.0, 3.0, 3.0]
    """
    rising = torch.tensor(measured, dtype=torch.float64).cummax(0).values
    out = torch.empty(levels[-1] + 1, dtype=torch.float64)
    for (low, a), (high, b) in itertools.pairwise(zip(levels, rising.tolist(), strict=True)):
        out[low : high + 1] = torch.linspace(a, b, high - low + 1, dtype=torch.float64)
    return out
