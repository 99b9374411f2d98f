"""One way to time things: interleaved, round by round, so that a slow phase of the machine hits each alike."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch

Run = Callable[[], object]
"""What is timed."""


def interleave(
    runs: Mapping[str, Run],
    rounds: int,
    *,
    warmup: int = 2,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    inference: bool = True,
) -> dict[str, list[float]]:
    """Time several things, interleaved; each round goes in the reverse order of the last.

    Args:
        rounds: number of rounds.
        warmup: calls of each before the first round (caches, pages, threads).
        min_seconds: shortest time between two looks at the clock; faster things are called several times in between.
        max_seconds: no further round begins after this time, but four are always done.
        clock: `time.thread_time` counts the time of one thread only, which other programs disturb less.
        inference: run under `torch.inference_mode`; False for what trains, or makes parameters that train later.

    Returns:
        The time of one call in each round, by name. Units: seconds.

    Example:
        >>> ticks = iter(range(100))
        >>> interleave({"a": lambda: None, "b": lambda: None}, 2, clock=lambda: next(ticks))
        {'a': [1.0, 1.0], 'b': [1.0, 1.0]}
    """
    with torch.inference_mode(inference):
        return _interleave(runs, rounds, warmup, min_seconds, max_seconds, clock)


def _interleave(
    runs: Mapping[str, Run],
    rounds: int,
    warmup: int,
    min_seconds: float,
    max_seconds: float,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    for run in list(runs.values()) * warmup:
        run()
    calls, names = 1, list(runs)
    if min_seconds:
        began = time.perf_counter()
        for run in runs.values():
            run()
        calls = max(1, round(len(runs) * min_seconds / max(time.perf_counter() - began, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            start = clock()
            for _ in range(calls):
                runs[name]()
            seconds[name].append((clock() - start) / calls)
        if number >= 3 and time.perf_counter() - began > max_seconds:
            break
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return 25 %, median and 75 %.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(seconds: Mapping[str, list[float]], baseline: str, other: str) -> list[float]:
    """Return the speed-up of one thing over the baseline, round by round.

    Example:
        >>> ratios({"dense": [1.0, 2.0], "sparse": [0.5, 0.5]}, "dense", "sparse")
        [2.0, 4.0]
    """
    return [a / max(b, 1e-12) for a, b in zip(seconds[baseline], seconds[other], strict=True)]


@contextlib.contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """Let torch have this many threads for a while; None = as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
