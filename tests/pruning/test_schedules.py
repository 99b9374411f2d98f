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
        ({"begin": 0.5, "end": 0.4}, "schedule 'cubic': `begin` must not be after `end`, got begin=0.5, end=0.4"),
        ({"begin": -0.1}, r"`begin` must be in \[0, 1\], got -0.1"),
        ({"end": 1.1}, r"`end` must be in \[0, 1\], got 1.1"),
        ({"end": math.nan}, r"`end` must be a number in \[0, 1\], got nan"),
        ({"begin": "0.1"}, r"`begin` must be a number in \[0, 1\], got '0.1'"),
        ({"end": True}, r"`end` must be a number in \[0, 1\], got True"),
        ({"initial": 1.0}, r"`initial` must be in \[0, 1\), got 1.0"),
        ({"initial": -0.1}, r"`initial` must be in \[0, 1\), got -0.1"),
        ({"every": 0}, "`every` must be a positive integer, got 0"),
        ({"every": 2.0}, "`every` must be a positive integer, got 2.0"),
        ({"every": True}, "`every` must be a positive integer, got True"),
        ({"freeze": 0.7}, r"`freeze` must be in \[end, 1\) = \[0\.8, 1\), got 0\.7"),
        ({"freeze": 1.0}, r"`freeze` must be in \[0, 1\), got 1\.0"),
        ({"freeze": "0.9"}, r"`freeze` must be a number in \[0, 1\), got '0.9'"),
    ],
)
def test_schedule_refuses_what_it_cannot_follow(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Cubic(**options)


def test_constant_refuses_a_ramp() -> None:
    with pytest.raises(RecipeError, match=r"has no ramp, so end=0\.5 must equal begin=0\.1"):
        Constant(begin=0.1, end=0.5)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_stepwise_refuses_what_is_not_a_number_of_steps(steps: Any) -> None:
    with pytest.raises(RecipeError, match="`steps` must be a positive integer, got "):
        Stepwise(steps=steps)
