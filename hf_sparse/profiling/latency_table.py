"""How long a sub-block takes on this machine, by the number of heads or neurons left. Measured once, then cached.

A table of measured latencies predicts speed better than a count of operations: a layer with a tenth of its neurons is
not ten times faster. (ZipLM and the retraining-free pruning of Kwon et al. spend their budgets by such tables.)
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .machine import machine
from .measurement_cache import MeasurementCache
from .timer import interleave

_ROUNDS = 9
_LEVELS = 16


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


Clock = Callable[[Shape, int], float]
"""Shape and number of groups left -> seconds."""


@torch.no_grad()
def measure(shape: Shape, groups: int) -> float:
    """Time a sub-block with this many groups left, on the CPU with torch's threads.

    Units: seconds, the median of several runs.
    """
    if groups == 0:
        return 0.0
    inner = groups * shape.size
    x = _randn(shape.batch, shape.length, shape.width)
    inputs = [_randn(inner, shape.width) for _ in range(shape.inputs)]
    output = _randn(shape.width, inner)
    run = _attention if shape.kind == "attention" else _feed_forward
    seconds = interleave({"run": lambda: run(shape, groups, x, inputs, output)}, _ROUNDS)
    return statistics.median(seconds["run"])


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

    Args:
        path: of the file; None = `latency.json` in the folder that HF_SPARSE_CACHE names, or in ~/.cache/hf_sparse.
        clock: what measures.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, clock: Clock = measure) -> None:
        self.cache = MeasurementCache(path, "latency.json")
        self.clock = clock

    def times(self, shape: Shape) -> Tensor:
        """Return the seconds for each number of groups from 0 to all, measured at some and linear between them.

        Shapes: `(groups + 1,)`, float64, never falling.
        """
        levels = shape.levels

        def valid(times: list[float]) -> bool:
            return len(times) == len(levels) and all(
                time > 0.0 for level, time in zip(levels, times, strict=True) if level
            )

        key = f"{machine()}; {dataclasses.astuple(shape)}"
        return _between(levels, self.cache.get(key, lambda: [self.clock(shape, level) for level in levels], valid))


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
