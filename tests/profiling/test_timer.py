"""The timing harness: order, number of calls, statistics; with a clock that does not measure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from hf_sparse.profiling.timer import in_rounds, interleave, quartiles, ratios, threads_of_torch


def record(order: list[str], *names: str) -> dict[str, Callable[[], object]]:
    return {name: (lambda name=name: order.append(name)) for name in names}  # type: ignore[misc]


def test_each_round_goes_in_the_reverse_order_of_the_last() -> None:
    order: list[str] = []
    interleave(record(order, "b", "a", "c"), rounds=3, warmup=0)
    assert order == ["b", "a", "c", "c", "a", "b", "b", "a", "c"]


def test_warm_up_is_not_timed() -> None:
    order: list[str] = []
    ticks = itertools.count()
    seconds = interleave(record(order, "a"), rounds=2, warmup=3, clock=lambda: float(next(ticks)))
    assert len(order) == 5
    assert seconds == {"a": [1.0, 1.0]}


def test_fast_things_are_called_several_times_between_two_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ticks = iter([0.0, 0.002, 0.0, *[0.0] * 9])  # calibration takes 2 ms, then the beginning of the rounds
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    clock = itertools.count(step=10)
    seconds = interleave(
        record(order, "a", "b"), rounds=2, warmup=0, min_seconds=0.01, clock=lambda: float(next(clock))
    )
    assert len(order) == 2 + 2 * 2 * 10
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}, "the time of one call"


def test_a_fixed_number_of_calls_between_two_looks_at_the_clock() -> None:
    order: list[str] = []
    clock = itertools.count(step=6)
    seconds = interleave(record(order, "a"), rounds=2, warmup=0, calls=3, clock=lambda: float(next(clock)))
    assert order == ["a"] * 6
    assert seconds == {"a": [2.0, 2.0]}, "the time of one call"


def test_results_of_what_measures_itself_are_kept_but_for_the_warm_up() -> None:
    given = itertools.count()
    found = in_rounds({"a": lambda: ("a", next(given)), "b": lambda: ("b", next(given))}, 2, warmup=1)
    assert found == {"a": [("a", 2), ("a", 5)], "b": [("b", 3), ("b", 4)]}


def test_no_round_begins_after_the_time_is_up_but_four_are_done() -> None:
    order: list[str] = []
    assert len(interleave(record(order, "a"), rounds=9, max_seconds=0.0)["a"]) == 4
    assert len(interleave(record(order, "a"), rounds=9)["a"]) == 9


def test_quartiles_and_ratios_by_hand() -> None:
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert ratios({"dense": [2.0, 3.0], "sparse": [1.0, 6.0]}, "dense", "sparse") == [2.0, 0.5]


def test_threads_are_restored_after_an_error() -> None:
    before, during = torch.get_num_threads(), list[int]()

    def fail() -> None:
        with threads_of_torch(before + 1):
            during.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert during == [before + 1]
    assert torch.get_num_threads() == before
    with threads_of_torch(None):
        assert torch.get_num_threads() == before
