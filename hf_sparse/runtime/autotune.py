"""Which product is faster here: each distinct shape is timed once, dense and packed in turns, and kept in a file."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .._version import __version__
from ..kernels import library_status
from ..profiling.latency_table import TimesFile, cache_folder, machine

MARGIN = 0.05
"""How much faster than dense a kernel has to be at every number of tokens timed, as a fraction of its own time: the
numbers between are not timed, and a little worse."""

_ROUNDS = 9
_LEAST = 0.001
_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is timed, as far as the time depends on it.

    Args:
        kind: the kernel of the report; "sparse_attention" for a product of queries, keys and values with its heads.
        shapes: of the weights; of an attention also the number of heads and their size.
        sparsity: of all of them together, in whole percents.
        rows: of their packed forms.
        tokens: rows of the input.
        device: its name, if it is not the CPU; runs then wait for it.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    sparsity: int
    rows: tuple[int, ...]
    tokens: int
    device: str = ""


@dataclasses.dataclass(frozen=True)
class Race:
    """What dense and packed products took.

    Args:
        dense: median, in seconds.
        packed: median, in seconds.
        low: lower quartile of dense over packed, round by round.
    """

    dense: float
    packed: float
    low: float

    @property
    def gain(self) -> float:
        """How many times as fast as the dense product the packed one is."""
        return self.dense / max(self.packed, 1e-12)

    @property
    def won(self) -> bool:
        """Whether it is faster by more than the margin, and in three rounds of four."""
        return self.gain >= 1.0 + MARGIN and self.low >= 1.0


Run = Callable[[], object]
Clock = Callable[[Trial, Run, Run], Race]
"""What is timed, its dense and its packed product -> what they took."""


@torch.no_grad()
def race(trial: Trial, dense: Run, packed: Run) -> Race:
    """Time two products in turns, the first one changing.

    Of one thread the time of the processor counts, which other programs disturb less than that of the clock.
    """
    alone = torch.get_num_threads() == 1 and not trial.device
    clock = time.thread_time if alone else time.perf_counter
    runs = (dense, packed)
    for run in (*runs, *runs):  # caches, pages, threads
        run()
    began = time.perf_counter()
    for run in runs:
        run()
    # A single short call says little: each turn takes a millisecond at least.
    calls = max(1, round(2 * _LEAST / max(time.perf_counter() - began, 1e-6)))
    seconds: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for number in range(_ROUNDS):
        for side in (0, 1) if number % 2 else (1, 0):
            start = clock()
            for _ in range(calls):
                runs[side]()
            seconds[side].append((clock() - start) / calls)
        if number >= 3 and time.perf_counter() - began > _SECONDS:
            break
    ratios = [a / max(b, 1e-12) for a, b in zip(*seconds, strict=True)]
    low = statistics.quantiles(ratios, n=4, method="inclusive")[0]
    return Race(statistics.median(seconds[0]), statistics.median(seconds[1]), low)


class SpeedTable:
    """Times of products on this machine, kept in a file between runs.

    Args:
        path: of the file; None = `runtime.json` beside the table of `LatencyTable`.
        clock: what measures.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, clock: Clock = race) -> None:
        self.file = TimesFile(Path(path) if path is not None else cache_folder() / "runtime.json")
        self.clock = clock

    def race(self, trial: Trial, dense: Run, packed: Run) -> Race:
        """Return what the products take, measured unless it is known."""
        key = f"{_versions()}; {dataclasses.astuple(trial)}"
        known = self.file.read().get(key)
        if known is None or len(known) != 3:
            known = list(dataclasses.astuple(self.clock(trial, dense, packed)))
            self.file.write({**self.file.read(), key: known})
        return Race(*known)


def _versions() -> str:
    status = library_status()
    built = int(Path(status.path).stat().st_mtime) if status.path is not None and Path(status.path).is_file() else 0
    return f"{machine()}, hf_sparse {__version__}, kernels {status.isa or 'absent'} of {built}"
