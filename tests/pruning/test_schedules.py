"""Schedules at points worked out by hand, and what they refuse. (The cubic corners are in test_by_hand.)"""

from __future__ import annotations

import math
from typing import Any

import pytest

from hf_sparse import RecipeError
from hf_sparse.config.sparsity import SCHEDULES
from hf_sparse.pruning.schedules import Constant, Cubic, Linear, Stepwise


@pytest.mark.parametrize(
    ("progress", "sparsity"), [(0.0, 0.1), (0.2, 0.1), (0.35, 0.3), (0.5, 0.5), (0.8, 0.9), (1.0, 0.9)]
)
def test_linear_rises_in_a_straight_line(progress: float, sparsity: float) -> None:
    assert Linear(begin=0.2, end=0.8, initial=0.1)(progress, 0.9) == pytest.approx(sparsity)


@pytest.mark.parametrize(
    ("progress", "sparsity"),
    [(0.0, 0.0), (0.2, 0.0), (0.21, 0.2), (0.39, 0.2), (0.41, 0.4), (0.61, 0.6), (0.79, 0.6), (0.8, 0.8), (1.0, 0.8)],
)
def test_stepwise_rises_in_equal_stairs(progress: float, sparsity: float) -> None:
    assert Stepwise(begin=0.2, end=0.8, steps=4)(progress, 0.8) == pytest.approx(sparsity)


def test_stepwise_of_one_stair_jumps_at_the_end() -> None:
    schedule = Stepwise(begin=0.2, end=0.8, steps=1)
    assert [schedule(progress, 0.8) for progress in (0.2, 0.5, 0.79, 0.8)] == [0.0, 0.0, 0.0, 0.8]


def test_constant_jumps_at_its_begin() -> None:
    schedule = Constant(begin=0.3, initial=0.1)
    assert [schedule(progress, 0.8) for progress in (0.0, 0.29, 0.3, 1.0)] == [0.1, 0.1, 0.8, 0.8]


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedule_that_ends_with_the_training_arrives_exactly(name: str) -> None:
    schedule = SCHEDULES.build({"name": name, "begin": 1.0} if name == "constant" else {"name": name, "end": 1.0})
    assert not schedule.reached(0.999)
    assert schedule(0.999, 0.7) < 0.7
    assert schedule.reached(1.0)
    assert schedule(1.0, 0.7) == 0.7


@pytest.mark.parametrize("name", ["linear", "cubic", "stepwise"])
def test_schedule_without_a_ramp_jumps(name: str) -> None:
    schedule = SCHEDULES.build({"name": name, "begin": 0.5, "end": 0.5})
    assert (schedule(0.499, 0.9), schedule(0.5, 0.9)) == (0.0, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": 0.5, "end": 0.4}, "goes from begin=0.5 to end=0.4"),
        ({"begin": -0.1}, "goes from begin=-0.1"),
        ({"end": 1.1}, "a schedule longer than the run would never reach its sparsity"),
        ({"end": math.nan}, "goes from begin=0.15 to end=nan"),
        ({"begin": "0.1"}, "begin is a number, not '0.1'"),
        ({"end": True}, "end is a number, not True"),
        ({"initial": 1.0}, "initial=1.0 is no sparsity"),
        ({"initial": -0.1}, "initial=-0.1 is no sparsity"),
        ({"every": 0}, "every=0 is no number of steps"),
        ({"every": 2.0}, "every=2.0 is no number of steps"),
        ({"every": True}, "every=True is no number of steps"),
        ({"freeze": 0.7}, r"freeze=0\.7 on, but they reach the final sparsity at end=0\.8"),
        ({"freeze": 1.0}, r"freeze=1\.0 on"),
        ({"freeze": "0.9"}, "freeze is a number, not '0.9'"),
    ],
)
def test_schedule_refuses_what_it_cannot_follow(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"schedule 'cubic'.*{message}"):
        Cubic(**options)


def test_constant_refuses_a_ramp() -> None:
    with pytest.raises(RecipeError, match=r"has no ramp, so end=0\.5 must equal begin=0\.1"):
        Constant(begin=0.1, end=0.5)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_stepwise_refuses_a_number_of_stairs_that_is_none(steps: Any) -> None:
    with pytest.raises(RecipeError, match="is no number of stairs"):
        Stepwise(steps=steps)
