"""One way to time things: interleaved, round by round, so that a slow phase of the machine hits each alike."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import torch

Run = Callable[[], object]
"""What is timed."""

K = TypeVar("K")
T = TypeVar("T")


def interleave(
    runs: Mapping[K, Run],
    rounds: int,
    *,
    warmup: int = 2,
    calls: int = 1,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    inference: bool = True,
) -> dict[K, list[float]]:
    """Time several things, interleaved; each round goes in the reverse order of the last.

    Args:
        rounds: number of rounds.
        warmup: calls of each before the first round (caches, pages, threads).
        calls: of each between two looks at the clock.
        min_seconds: shortest time between two looks at the clock; faster things are called more often in between.
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
        for run in list(runs.values()) * warmup:
            run()
        if min_seconds:
            began = time.perf_counter()
            for run in runs.values():
                run()
            calls = max(calls, round(len(runs) * min_seconds / max(time.perf_counter() - began, 1e-6)))
        timed = {name: partial(_seconds, run, calls, clock) for name, run in runs.items()}
        return in_rounds(timed, rounds, warmup=0, max_seconds=max_seconds)


def _seconds(run: Run, calls: int, clock: Callable[[], float]) -> float:
    """Return the time of one call."""
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def in_rounds(
    runs: Mapping[K, Callable[[], T]], rounds: int, *, warmup: int = 2, max_seconds: float = float("inf")
) -> dict[K, list[T]]:
    """Call several things, interleaved as by `interleave`: for what measures itself, in a process of its own, say.

    Args:
        rounds: number of rounds.
        warmup: calls of each before the first round, whose results are dropped.
        max_seconds: no further round begins after this time, but four are always done.

    Returns:
        The result of each round, by name.

    Example:
        >>> order = iter(range(100))
        >>> in_rounds({"a": lambda: next(order), "b": lambda: next(order)}, 2, warmup=0)
        {'a': [0, 3], 'b': [1, 2]}
    """
    for run in list(runs.values()) * warmup:
        run()
    results: dict[K, list[T]] = {name: [] for name in runs}
    names = list(runs)
    began = time.perf_counter()
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            results[name].append(runs[name]())
        if number >= 3 and time.perf_counter() - began > max_seconds:
            break
    return results


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


def ratios(seconds: Mapping[K, list[float]], baseline: K, other: K) -> list[float]:
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
