"""Progress of training in [0, 1] -> sparsity."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..config.sparsity import SCHEDULES
from ..errors import RecipeError
from ..utils.validation import check_number, check_positive_int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of all schedules: `initial` until `begin`, the final sparsity from `end` on, a ramp between.

    Args:
        begin: progress at which the ramp starts, a fraction of training.
        end: progress from which on the final sparsity holds.
        initial: sparsity before the ramp.
        every: optimizer steps between two renewals of the masks; 1 is the papers' choice, more costs less time.
        freeze: progress from which on the masks stay as they are, so that the weights that are left settle; None = they
            go on changing at the final sparsity until training ends.
    """

    begin: float = 0.15
    end: float = 0.8
    initial: float = 0.0
    every: int = 1
    freeze: float | None = None
    name: ClassVar[str]

    def __post_init__(self) -> None:
        for key in ("begin", "end", "initial"):
            check_number(key, getattr(self, key), "[0, 1)" if key == "initial" else "[0, 1]")
        if not 0.0 <= self.begin <= self.end <= 1.0:
            raise RecipeError(
                f"schedule '{self.name}': `begin` must not be after `end`, got begin={self.begin}, end={self.end}; "
                "both are fractions of the training"
            )
        self._check_freeze()
        check_positive_int("every", self.every)

    def _check_freeze(self) -> None:
        if self.freeze is None:
            return
        check_number("freeze", self.freeze, "[0, 1)")
        if not self.end <= self.freeze < 1.0:
            raise RecipeError(
                f"schedule '{self.name}': `freeze` must be in [end, 1) = [{self.end}, 1), got {self.freeze}: before "
                "that the masks have not reached the final sparsity"
            )

    def frozen(self, progress: float) -> bool:
        """Return whether the masks are to stay as they are at `progress`."""
        return self.freeze is not None and progress > self.freeze

    def ramp(self, x: float) -> float:
        """Return the share of the way from initial to final after the share x of the ramp, both in [0, 1]."""
        raise NotImplementedError

    def __call__(self, progress: float, final: float) -> float:
        """Return the sparsity at `progress` on the way to `final`."""
        if self.reached(progress):
            return final
        if progress <= self.begin:
            return self.initial
        x = (progress - self.begin) / (self.end - self.begin)
        return self.initial + (final - self.initial) * self.ramp(x)

    def reached(self, progress: float) -> bool:
        """Return whether the final sparsity holds at `progress`."""
        return progress >= self.end


@SCHEDULES.register("constant")
@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """Hold the final sparsity from `begin` on; by default from the first step.

    Example:
        >>> Constant()(0.0, 0.9), Constant(begin=0.5)(0.4, 0.9)
        (0.9, 0.0)
    """

    begin: float = 0.0
    end: float | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.end is None:
            object.__setattr__(self, "end", self.begin)
        if self.end != self.begin:
            raise RecipeError(f"schedule 'constant' has no ramp, so end={self.end} must equal begin={self.begin}")
        super().__post_init__()


@SCHEDULES.register("linear")
@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """Rise in a straight line from `initial` at `begin` to the final sparsity at `end`.

    Example:
        >>> Linear(begin=0.0, end=1.0)(0.5, 0.8)
        0.4
    """

    def ramp(self, x: float) -> float:
        return x


@SCHEDULES.register("cubic")
@dataclasses.dataclass(frozen=True)
class Cubic(Schedule):
    """Rise fast at first, then ever slower: `s = s_f + (s_i - s_f) (1 - x)^3`.

    Example:
        >>> round(Cubic(begin=0.0, end=1.0)(0.5, 0.8), 6)
        0.7

    Source: Zhu and Gupta 2017, "To prune, or not to prune", eq. 1.
    """

    def ramp(self, x: float) -> float:
        return 1.0 - (1.0 - x) ** 3


@SCHEDULES.register("stepwise")
@dataclasses.dataclass(frozen=True)
class Stepwise(Schedule):
    """Rise in equal steps, the first at `begin`, the last at `end`.

    Args:
        steps: number of steps of the ramp.

    Example:
        >>> [round(Stepwise(begin=0.0, end=1.0, steps=2)(p, 0.8), 2) for p in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.4, 0.4, 0.8]
    """

    steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("steps", self.steps)

    def ramp(self, x: float) -> float:
        # The last stair is the end itself, so the ramp holds the stairs before it: steps=1 jumps at the end.
        return min(int(x * (self.steps - 1)) + 1, self.steps - 1) / self.steps if self.steps > 1 else 0.0
