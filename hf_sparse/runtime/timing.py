"""Which product is faster here: each distinct shape is timed once, dense and packed in turns, and kept in a file."""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..kernels import library_status
from ..latency import TimesFile, cache_folder, machine

MARGIN = 0.03
"""How much faster than dense a kernel has to be at every number of tokens, as a fraction of the dense time."""

_KERNELS = 2
"""Counts up where the kernels change speed, so that times of the old ones are measured again."""

_ROUNDS = 7
_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is timed, as far as the time depends on it.

    Args:
        kind: the kernel of the report.
        shapes: of the weights.
        sparsity: of all of them together, in whole percents.
        rows: of their packed forms.
        tokens: rows of the input.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    sparsity: int
    rows: tuple[int, ...]
    tokens: int


Run = Callable[[], object]
Clock = Callable[[Trial, Run, Run], tuple[float, float]]
"""What is timed, its dense and its packed product -> seconds of each."""


@torch.no_grad()
def race(trial: Trial, dense: Run, packed: Run) -> tuple[float, float]:
    """Time two products in turns, the first one changing; the medians.

    Units: seconds.
    """
    for run in (dense, packed, dense, packed):  # caches, pages, threads
        run()
    seconds: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for number in range(_ROUNDS):
        for side in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            (dense, packed)[side]()
            seconds[side].append(time.perf_counter() - start)
        if number >= 2 and time.perf_counter() - began > _SECONDS:
            break
    return statistics.median(seconds[0]), statistics.median(seconds[1])


class SpeedTable:
    """Times of products on this machine, kept in a file between runs.

    Args:
        path: of the file; None = `runtime.json` beside the table of `LatencyTable`.
        clock: what measures.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, clock: Clock = race) -> None:
        self.file = TimesFile(Path(path) if path is not None else cache_folder() / "runtime.json")
        self.clock = clock

    def gain(self, trial: Trial, dense: Run, packed: Run) -> float:
        """Return the time of the dense product over that of the packed one, measured unless it is known."""
        key = f"{_versions()}; {dataclasses.astuple(trial)}"
        known = self.file.read().get(key)
        if known is None or len(known) != 2:
            known = list(self.clock(trial, dense, packed))
            self.file.write({**self.file.read(), key: known})
        return known[0] / max(known[1], 1e-12)


def _versions() -> str:
    own = getattr(sys.modules["hf_sparse"], "__version__", "unknown")  # set by a floor above this one
    return f"{machine()}, hf_sparse {own}, kernels {library_status().isa or 'absent'}, {_KERNELS}"
