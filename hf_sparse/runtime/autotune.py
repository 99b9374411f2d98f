"""Which kernel is faster here: each distinct shape is timed once, dense and packed interleaved, and cached."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .._version import __version__
from ..kernels import library_status
from ..profiling.machine import machine
from ..profiling.measurement_cache import MeasurementCache
from ..profiling.timer import Run, interleave, quartiles, ratios

MARGIN = 0.05
"""How much faster than dense a kernel has to be at every token count that is timed, as a fraction of its time: token
counts in between are not timed, and are a little worse."""

TOLERANCE = 0.03
"""Slow-down that is noise, as a fraction: two runs of one matmul differ by as much."""

DECODING = 8
"""Token counts up to this one are those of a model that generates: one token of each sequence."""

_ROUNDS = 9
_MIN_SECONDS = 0.001
_MAX_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is timed, as far as the time depends on it.

    Args:
        kind: the kernel of the report; "sparse_attention" for query, key and value with all heads.
        shapes: of the weights; of an attention also the number of heads and their size.
        sparsity: of all weights together, in whole percents.
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
class Measurement:
    """Time of a dense and a packed matmul.

    Args:
        dense: median, in seconds.
        packed: median, in seconds.
        low: lower quartile of the speed-up, round by round.
    """

    dense: float
    packed: float
    low: float

    @property
    def speedup(self) -> float:
        """Dense time over packed time."""
        return self.dense / max(self.packed, 1e-12)

    @property
    def is_faster(self) -> bool:
        """Whether packed is faster by more than the margin, and faster at all in three rounds of four."""
        return self.speedup >= 1.0 + MARGIN and self.low >= 1.0


Clock = Callable[[Trial, Run, Run], Measurement]
"""What is timed, its dense and its packed matmul -> their times."""


def measure(trial: Trial, dense: Run, packed: Run) -> Measurement:
    """Time two matmuls, interleaved."""
    one_thread = torch.get_num_threads() == 1 and not trial.device
    seconds = interleave(
        {"dense": dense, "packed": packed},
        _ROUNDS,
        min_seconds=_MIN_SECONDS,
        max_seconds=_MAX_SECONDS,
        clock=time.thread_time if one_thread else time.perf_counter,
    )
    low, _, _ = quartiles(ratios(seconds, "dense", "packed"))
    return Measurement(statistics.median(seconds["dense"]), statistics.median(seconds["packed"]), low)


def why_dense(kernel: str, measured: Mapping[int, Measurement]) -> str | None:
    """Return why a layer stays dense, at the token count that is worst for the kernel; None if the kernel is faster.

    Where few tokens are timed, because the model generates, the kernel has to be faster at those; at more tokens it
    must not be slower.

    Example:
        >>> why_dense("sparse_linear", {17: Measurement(1.0, 1.25, 0.7)})
        'dense is faster: the speed-up of sparse_linear is 0.80x at 17 tokens'
        >>> why_dense("sparse_linear", {17: Measurement(1.0, 0.5, 1.9), 65: Measurement(1.0, 0.97, 1.02)})
        'dense is as fast: the speed-up of sparse_linear is 1.03x at 65 tokens, and less than 1.05x'
        >>> why_dense("csr", {17: Measurement(1.0, 0.9, 0.95)})
        'the speed-up of csr is not reproducible: 1.11x at 17 tokens, lower quartile 0.95x'
    """
    few = {count: each for count, each in measured.items() if count <= DECODING} or measured
    slower = {count: each for count, each in measured.items() if each.speedup < 1.0 - TOLERANCE}
    compared = slower or few
    tokens = min(compared, key=lambda count: (compared[count].is_faster, compared[count].speedup))
    worst = compared[tokens]
    if worst.is_faster:
        return None
    speedup = f"{worst.speedup:.2f}x at {tokens} token{'s' if tokens > 1 else ''}"
    if worst.speedup < 1.0:
        return f"dense is faster: the speed-up of {kernel} is {speedup}"
    if worst.speedup < 1.0 + MARGIN:
        return f"dense is as fast: the speed-up of {kernel} is {speedup}, and less than {1.0 + MARGIN:.2f}x"
    return f"the speed-up of {kernel} is not reproducible: {speedup}, lower quartile {worst.low:.2f}x"


class SpeedTable:
    """Times of matmuls on this machine, cached in a file.

    Args:
        path: of the file; None = `runtime.json` in the folder of `hf_sparse.profiling.machine.cache_folder`.
        clock: what measures.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, clock: Clock = measure) -> None:
        self.cache = MeasurementCache(path, "runtime.json")
        self.clock = clock

    def measure(self, trial: Trial, dense: Run, packed: Run) -> Measurement:
        """Return the times of two matmuls, measured unless they are known."""
        key = f"{_versions()}; {dataclasses.astuple(trial)}"

        def measured() -> list[float]:
            return list(dataclasses.astuple(self.clock(trial, dense, packed)))

        return Measurement(*self.cache.get(key, measured, _is_measurement, keep=_is_reproducible))


def _is_measurement(times: list[float]) -> bool:
    return len(times) == 3 and all(time > 0.0 for time in times)


def _is_reproducible(times: list[float]) -> bool:
    """Return whether the quartiles agree with the medians; where they do not, the machine was busy."""
    measured = Measurement(*times)
    return measured.is_faster or measured.speedup < 1.0 + MARGIN


def _versions() -> str:
    status = library_status()
    built = int(Path(status.path).stat().st_mtime) if status.path is not None and Path(status.path).is_file() else 0
    return f"{machine()}, hf_sparse {__version__}, kernels {status.isa or 'absent'} of {built}"
