"""Dynamic sparse training: from time to time the smallest weights are dropped, and as many others grow from zero."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ...config.sparsity import SCORERS
from ...errors import RecipeError
from ..selection.topk import keep_highest
from .base import Scorer, is_number


@dataclasses.dataclass
class _Regrowing(Scorer):
    """Start from the largest weights; every `every` renewals drop a fraction of those kept, and grow as many.

    A grown weight starts at 0, so the model computes the same just after it. What was dropped may grow again at once,
    with its value. The sparsity is the schedule's at every step; with schedule "constant" it never changes.

    Args:
        fraction: of the kept groups of each weight that is dropped at one update.
        every: renewals of the masks between two updates: optimizer steps, unless the schedule says otherwise.
        until: progress from which on the masks stay as they are, so that what has grown is trained.
    """

    regrows = True
    fraction: float = 0.3
    every: int = 100
    until: float = 0.75
    renewals: Tensor = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("fraction", "until"):
            value = getattr(self, key)
            if not is_number(value) or not 0.0 < value < 1.0:
                raise RecipeError(f"scorer '{self.name}': {key}={value!r} is no number between 0 and 1")
        if type(self.every) is not int or self.every < 1:
            raise RecipeError(f"scorer '{self.name}': every={self.every!r} is no number of steps")

    def check_steps(self, every: int, steps: int) -> None:
        first = self.every * every
        if first >= self.until * steps:
            raise RecipeError(
                f"scorer '{self.name}' would drop and grow weights at step {first} for the first time, but until="
                f"{self.until:g} of the {steps} steps of this training ends that before, so nothing would ever grow. "
                f"Lower the scorer's every={self.every}, or train longer"
            )

    def shared_state(self, parameters: int) -> dict[str, Tensor]:
        self.renewals = torch.tensor(0.0, dtype=torch.float64)
        return {"renewals": self.renewals}

    def adapt(self, threshold: float | None, level: float) -> None:
        self.renewals += 1

    def element_scores(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        return weight.detach().abs()

    def updates(self, progress: float) -> bool:
        done = int(self.renewals)
        return done > 0 and done % self.every == 0 and progress < self.until

    def share(self, progress: float) -> float:
        """Return the fraction that is dropped at an update."""
        return self.fraction

    def regrow(self, magnitude: Tensor, kept: Tensor, growth: Tensor, progress: float) -> Tensor:
        magnitude, staying = magnitude.float(), kept
        count = int(torch.count_nonzero(kept))
        if count and self.updates(progress):
            left = count - int(self.share(progress) * count)
            (staying,), _ = keep_highest([torch.where(kept, magnitude, -1.0)], left)
        # Below all that stay, in the order of growth and with all of its precision, however small it is.
        rest = -growth.float().clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
        return torch.where(staying, magnitude, rest)


@SCORERS.register("rigl")
@dataclasses.dataclass
class RigL(_Regrowing):
    """Drop the smallest weights, grow those with the largest gradient; fewer and fewer, as `fraction/2 (1 + cos)`.

    Example:
        >>> import torch
        >>> scorer = RigL(fraction=0.5, every=1)
        >>> _ = scorer.shared_state(4)
        >>> scorer.adapt(None, 1.0)
        >>> kept = torch.tensor([True, True, False, False])
        >>> scorer.regrow(torch.tensor([3.0, 1.0, 0.0, 0.0]), kept, torch.tensor([0.0, 0.1, 0.5, 0.2]), 0.0).tolist()
        [3.0, -10.0, -2.0, -5.0]

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3.
    """

    observes = True
    forgets = True

    def watches(self, progress: float) -> bool:
        # In the paper too the gradient is that of the one batch of the update (algorithm 1).
        return self.updates(progress)

    def share(self, progress: float) -> float:
        return self.fraction / 2 * (1.0 + math.cos(math.pi * progress / self.until))

    def observe(self, importance: Tensor, weight: Tensor, gradient: Tensor) -> None:
        importance.copy_(gradient).abs_()

    def growth(self, gradient: Tensor | None, kept: Tensor, place: int) -> Tensor:
        return torch.zeros_like(kept, dtype=torch.float32) if gradient is None else gradient


@SCORERS.register("set")
@dataclasses.dataclass
class SET(_Regrowing):
    """Drop the smallest weights, grow others at random, always the same fraction.

    Args:
        seed: of the draw, which depends on it, the renewal and the place of the weight alone, on every process.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity
    inspired by network science", algorithm 1.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise RecipeError(f"scorer 'set': seed={self.seed!r} is no whole number from 0 on")

    def growth(self, gradient: Tensor | None, kept: Tensor, place: int) -> Tensor:
        number = ((self.seed * 1_000_003 + int(self.renewals)) * 1_000_003 + place) % (1 << 63)
        generator = torch.Generator().manual_seed(number)
        return torch.rand(kept.shape, generator=generator).to(kept.device)
