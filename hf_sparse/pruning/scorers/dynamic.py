"""Dynamic sparse training: from time to time the smallest weights are dropped, and as many others grow from zero."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ...config.sparsity import SCORERS
from ...errors import RecipeError
from ...utils.validation import check_number, check_positive_int
from ..selection import Selection, keep_highest
from ..shards import count_true
from ..state_fields import shared_field
from ..unit import Unit
from .base import Group, Scorer, check_seed


@dataclasses.dataclass
class DynamicScorer(Scorer):
    """Start from the largest weights; every `every` renewals drop a fraction of those kept, and grow as many.

    A grown weight starts at 0, so the model computes the same just after it. What was dropped may grow again at once,
    with its value. The sparsity is the schedule's at every step; with schedule "constant" it never changes.

    Args:
        fraction: of the kept groups of each weight that is dropped at one update.
        every: renewals of the masks between two updates: optimizer steps, unless the schedule has another `every`.
        until: progress from which on the masks stay as they are, so that what has grown is trained.
    """

    elementwise = True
    keeps_largest = True
    fields = (shared_field("renewals"),)
    fraction: float = 0.3
    every: int = 100
    until: float = 0.75
    renewals: Tensor = dataclasses.field(init=False, repr=False, compare=False)
    _updated_at: float | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, "(0, 1)")
        check_number("until", self.until, "(0, 1)")
        check_positive_int("every", self.every)

    def check_selection(self, selection: Selection) -> None:
        if selection.decides_sparsity:
            raise RecipeError(
                f"scorer '{self.name}' drops and grows weights at the scheduled sparsity, but selection "
                f"'{selection.name}' decides the sparsity itself. Use selection 'uniform' or 'global' and give a "
                "sparsity"
            )

    def check_steps(self, every: int, steps: int) -> None:
        first = self.every * every
        if first >= self.until * steps:
            raise RecipeError(
                f"scorer '{self.name}' would drop and grow weights at step {first} for the first time, but until="
                f"{self.until:g} of the {steps} steps of this training ends that before, so nothing would ever grow. "
                f"Lower the scorer's every={self.every}, or train longer"
            )

    def shared_state(self, parameters: int) -> dict[str, Tensor]:
        self._updated_at = None
        self.renewals = torch.tensor(0.0, dtype=torch.float64)
        return {"renewals": self.renewals}

    def element_scores(self, weight: Tensor) -> Tensor:
        return weight.detach().abs()

    def update(self, group: Group) -> bool:
        sparsity, progress = group.current_sparsity, group.progress
        if not self.updates(progress) and self._updated_at == sparsity:
            return False  # between updates the masks stay, and cost nothing
        indices = {unit.name: index for index, unit in enumerate(group.units)}

        def score(unit: Unit) -> Tensor:
            kept = unit.kept_placed()
            growth = unit.placed(self.growth(unit, kept, indices[unit.name]))
            return self.regrow(self.scores(unit), kept, growth, progress)

        for unit, groups in group.choose(score):
            unit.grow(groups)
        self._updated_at = sparsity
        return True

    def after_update(self, group: Group) -> None:
        self.renewals += 1

    def updates(self, progress: float) -> bool:
        """Return whether weights are dropped and grown at this renewal."""
        done = int(self.renewals)
        return done > 0 and done % self.every == 0 and progress < self.until

    def growth(self, unit: Unit, kept: Tensor, index: int) -> Tensor:
        """Return how much each removed group deserves to grow, at least 0.

        Args:
            kept: which groups are kept, divided among the processes as weights are.
            index: of the unit in its group.
        """
        raise NotImplementedError

    def share(self, progress: float) -> float:
        """Return the fraction that is dropped at an update."""
        return self.fraction

    def regrow(self, magnitude: Tensor, kept: Tensor, growth: Tensor, progress: float) -> Tensor:
        """Return scores of groups, by which a selection keeps what stays, then what grows."""
        magnitude, staying = magnitude.float(), kept
        count = count_true([kept])
        if count and self.updates(progress):
            left = count - int(self.share(progress) * count)
            (staying,), _ = keep_highest([torch.where(kept, magnitude, -1.0)], left)
        # Below all that stay, in the order of growth and with all of its precision, however small it is.
        rest = -growth.float().clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
        return torch.where(staying, magnitude, rest)


@SCORERS.register("rigl")
@dataclasses.dataclass
class RigL(DynamicScorer):
    """Drop the smallest weights, grow those with the largest gradient; fewer and fewer, as `fraction/2 (1 + cos)`.

    Example:
        >>> import torch
        >>> scorer = RigL(fraction=0.5, every=1)
        >>> _ = scorer.shared_state(4)
        >>> scorer.renewals += 1
        >>> kept = torch.tensor([True, True, False, False])
        >>> scorer.regrow(torch.tensor([3.0, 1.0, 0.0, 0.0]), kept, torch.tensor([0.0, 0.1, 0.5, 0.2]), 0.0).tolist()
        [3.0, -10.0, -2.0, -5.0]

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3.
    """

    source = "gradients"
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def on_attach(self, unit: Unit) -> None:
        unit.watch(True)

    def on_gradient(self, unit: Unit) -> None:
        gradients = [member.gradient for member in unit.members if member.gradient is not None]
        if len(gradients) == len(unit.members):
            self.gradients[unit.name] = unit.pool_placed(gradients, torch.abs)

    def after_update(self, group: Group) -> None:
        super().after_update(group)
        # In the paper too the gradient is that of the one batch of the update (algorithm 1).
        self.gradients.clear()
        for unit in group.units:
            unit.watch(self.updates(group.progress))

    def share(self, progress: float) -> float:
        return self.fraction / 2 * (1.0 + math.cos(math.pi * progress / self.until))

    def growth(self, unit: Unit, kept: Tensor, index: int) -> Tensor:
        gradient = self.gradients.get(unit.name)
        return torch.zeros_like(kept, dtype=torch.float32) if gradient is None else gradient


@SCORERS.register("set")
@dataclasses.dataclass
class SET(DynamicScorer):
    """Drop the smallest weights, grow others at random, always the same fraction.

    Args:
        seed: of the draw, which depends on it, the renewal and the index of the weight alone, on every process.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity
    inspired by network science", algorithm 1.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def growth(self, unit: Unit, kept: Tensor, index: int) -> Tensor:
        number = ((self.seed * 1_000_003 + int(self.renewals)) * 1_000_003 + index) % (1 << 63)
        generator = torch.Generator().manual_seed(number)
        return torch.rand(kept.shape, generator=generator).to(kept.device)
