"""What a scorer is: a rule that says how important a weight, or a group of weights, is.

A scorer that looks at weights alone defines `element_scores`. One that keeps something overrides hooks: `on_attach`
makes it, `on_gradient` updates it, `scores` reads it, `after_update` lets it go; what has to survive in a checkpoint it
declares in `fields`. A method that chooses masks in another way (RigL) overrides the one step `update`. Nothing outside
of the scorer's file knows its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ...errors import RecipeError
from ...utils.validation import check_number, check_one_of
from ..patterns import Pattern
from ..processes import sum_over_processes
from ..selection import Selection
from ..shards import local, placed_as
from ..state_fields import StateField, tensor_field
from ..unit import Unit

Source = Literal["weights", "gradients", "training", "heads", "inputs"]


class Group(Protocol):
    """What a scorer sees of the group of weights that it works for."""

    units: list[Unit]
    selection: Selection
    progress: float

    @property
    def current_sparsity(self) -> float:
        """Scheduled sparsity of the moment."""

    @property
    def level(self) -> float:
        """Scheduled sparsity as a fraction of the final one, in [0, 1]."""

    def choose(self, score: Callable[[Unit], Tensor]) -> Iterable[tuple[Unit, Tensor]]:
        """Return each unit with which of its groups to keep at the sparsity of the moment, by a score of each."""


class Scorer:
    """Base of all scorers. Higher scores are more important. One object serves one group, and holds its state.

    Attributes:
        source: where scores come from: "weights" alone; "gradients" of the training, or of calibration data in one-shot
            pruning; "training" for parameters that are learned with the model; "heads" for a measurement on data
            before pruning; "inputs" of the layers on calibration data, block by block.
        fields: what a checkpoint holds of the method for each weight.
        elementwise: whether the score of an entry depends on that entry (and its gradients) alone. Where weights are
            sharded, others are gathered for it, one unit at a time; scorers of gradients are refused then.
        keeps_largest: whether the first masks keep the weights with the largest absolute values.
        learning_rate: of learned scores; their parameter group has no weight decay.
        warmup: fraction of training over which their learning rate rises from 0.
    """

    name: ClassVar[str]
    source: ClassVar[Source] = "weights"
    fields: ClassVar[tuple[StateField, ...]] = ()
    elementwise: ClassVar[bool] = False
    keeps_largest: ClassVar[bool] = False
    learning_rate: float = 0.0
    warmup: float = 0.0

    # -- what a scorer of weights defines ------------------------------------------------------------------------------

    def element_scores(self, weight: Tensor) -> Tensor:
        """Return one score per entry.

        Args:
            weight: the weight, dense: entries that are masked at the moment have their old value.

        Shapes: `(out, in)` -> `(out, in)`.
        """
        raise NotImplementedError

    # -- hooks, in the order in which they are called ------------------------------------------------------------------

    def check_selection(self, selection: Selection) -> None:
        """Raise `RecipeError` if the method does not work with this selection."""

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise `PatternError` if the method does not work with this pattern."""

    def check_reconstruction(self) -> None:
        """Raise `RecipeError` if nothing may change the values that the method leaves."""

    def check_steps(self, every: int, steps: int) -> None:
        """Raise `RecipeError` if so short a training leaves the method nothing to do.

        Args:
            every: steps between two renewals of the masks.
            steps: of the training.
        """

    def shared_state(self, parameters: int) -> dict[str, Tensor]:
        """Make the numbers that all weights of the group share and that `fields` lists; they are updated in place.

        Args:
            parameters: number of weights in the group.
        """
        return {}

    def on_attach(self, unit: Unit) -> None:
        """Make what the method keeps for a unit; its masks exist, and are not on the weights yet."""

    def on_gradient(self, unit: Unit) -> None:
        """Look at the gradients of one optimizer step (`Member.gradient`); for the source "gradients"."""

    def sum_over_processes(self, unit: Unit) -> None:
        """Add up what processes have seen of gradients of their own; where `additive`."""

    def scores(self, unit: Unit) -> Tensor:
        """Return the score of each group of a unit, divided among the processes as its weights are."""
        if self.elementwise and unit.source is None:
            return unit.pool_placed([member.dense for member in unit.members], self.element_scores)
        return unit.placed(unit.score(self.element_scores))

    def update(self, group: Group) -> bool:
        """Choose the masks anew, and return whether the weights were scored for it."""
        for unit, groups in group.choose(self.scores):
            unit.keep(groups)
        return True

    def after_update(self, group: Group) -> None:
        """Learn how the selection went."""

    # -- what others want to know --------------------------------------------------------------------------------------

    def own_selection(self) -> Selection | None:
        """Return the selection that the method is defined with, or None for the general default."""
        return None

    def works_on_shards(self) -> bool:
        """Return whether scores can be computed where each process has some rows of each weight (fully_shard)."""
        return True

    def penalty(self, scores: Sequence[Tensor]) -> Tensor:
        """Return what is to be added to the loss, a scalar; for methods that have a loss term."""
        raise NotImplementedError

    @property
    def additive(self) -> bool:
        """Whether what the method keeps of gradients is a sum over them, in any order."""
        return False

    @property
    def penalized(self) -> bool:
        """Whether the method adds a term to the loss: it overrides `penalty`."""
        return type(self).penalty is not Scorer.penalty

    def logs(self, threshold: float | None) -> dict[str, float]:
        """Return numbers worth logging about the last selection."""
        return {} if threshold is None else {"threshold": threshold}


class LearnedScorer(Scorer):
    """Base of scorers whose scores are parameters, one per group, trained with the model.

    A dataclass below has the fields `learning_rate`, `warmup` and `dtype`, the name of their torch data type.
    """

    source = "training"
    fields: ClassVar[tuple[StateField, ...]] = (tensor_field("scores"),)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, "(0, inf)")
        check_number("warmup", self.warmup, "[0, 1)")
        check_one_of("dtype", self.dtype, ("float32", "bfloat16"))

    def on_attach(self, unit: Unit) -> None:
        weight = unit.members[0].weight
        shape = unit.pattern.groups_shape(tuple(weight.shape))
        zeros = torch.zeros(shape, dtype=getattr(torch, self.dtype), device=weight.device)
        unit.masked.scores = nn.Parameter(placed_as(zeros, weight))

    def scores(self, unit: Unit) -> Tensor:
        scores = unit.masked.scores
        assert scores is not None
        return scores.detach()


class GradientScorer(Scorer):
    """Base of scorers that keep a tensor like each weight, and update it with every gradient (`observe`).

    Where weights are sharded, so are gradients and what is kept of them, and `observe` sees the rows of one process.
    """

    source = "gradients"
    fields = (tensor_field("importance"),)

    def observe(self, importance: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """Update `importance` in place with the gradient of one optimizer step.

        Args:
            gradient: of the loss with respect to the masked weight, dense: entries that are masked have theirs too.
        """
        raise NotImplementedError

    def on_attach(self, unit: Unit) -> None:
        for member in unit.members:
            zeros = torch.zeros_like(member.weight, dtype=torch.float32, requires_grad=False)
            member.masked.register_buffer("importance", zeros)
        unit.watch(True)

    def on_gradient(self, unit: Unit) -> None:
        for member in unit.members:
            if member.gradient is not None:
                importance = member.masked.get_buffer("importance")
                self.observe(local(importance), local(member.dense), local(member.gradient))

    def sum_over_processes(self, unit: Unit) -> None:
        for member in unit.members:
            sum_over_processes(member.masked.get_buffer("importance"))

    def scores(self, unit: Unit) -> Tensor:
        return unit.pool_placed([member.masked.get_buffer("importance") for member in unit.members])

    def works_on_shards(self) -> bool:
        return self.elementwise


def check_seed(seed: object) -> None:
    """Raise `RecipeError` unless a seed is an integer that torch takes."""
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise RecipeError(f"`seed` must be an integer in [0, 2**63), got {seed!r}")
