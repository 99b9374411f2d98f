"""What a scorer is: a rule that says how important a weight, or a group of weights, is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..selection import Selection


def is_number(value: Any) -> bool:
    """Return whether an option is a number: no text (YAML reads some as text, such as 1e-2) and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Scorer:
    """Base of all scorers. Higher scores are more important.

    Attributes:
        learned: the scores are parameters, one per group, trained with the model (movement).
        observes: the scorer looks at gradients (`observe`) and keeps a tensor like the weight.
        forgets: what it keeps of them serves the next update of the masks alone, and is let go after it.
        penalized: the method adds a term to the loss (`penalty`).
        measures: scores come from a pass over data before pruning (`Pruner.measure`), never from training.
        regrows: the masks stay as they are but for updates, which drop some weights and grow others (`regrow`).
        learning_rate: of learned scores; their parameter group has no weight decay.
        warmup: fraction of training over which their learning rate rises from 0.
        dtype: name of their torch data type.
    """

    name: ClassVar[str]
    learned: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    forgets: ClassVar[bool] = False
    penalized: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    regrows: ClassVar[bool] = False
    learning_rate: float = 0.0
    warmup: float = 0.0
    dtype: str = "float32"

    def element_scores(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """Return one score per entry; for scorers that are not learned.

        Args:
            weight: the weight, dense: entries that are masked at the moment have their old value.
            importance: what `observe` has gathered, like the weight; None for scorers that do not observe.

        Shapes: `(out, in)` -> `(out, in)`.
        """
        raise NotImplementedError

    def observe(self, importance: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """Update `importance` in place with the gradient of one optimizer step.

        Args:
            gradient: of the loss with respect to the masked weight, dense: entries that are masked have theirs too.
        """
        raise NotImplementedError

    def watches(self, progress: float) -> bool:
        """Return whether the gradient of the next step is wanted, if the masks have just been renewed at `progress`."""
        return self.observes

    def updates(self, progress: float) -> bool:
        """Return whether weights are dropped and grown at this renewal; for methods that regrow."""
        raise NotImplementedError

    def growth(self, gradient: Tensor | None, kept: Tensor, place: int) -> Tensor:
        """Return how much each removed group deserves to grow, at least 0; for methods that regrow.

        Args:
            gradient: what `observe` has gathered, one number per group; None if nothing was.
            kept: which groups are kept.
            place: number of the unit among those of its plan.
        """
        raise NotImplementedError

    def regrow(self, magnitude: Tensor, kept: Tensor, growth: Tensor, progress: float) -> Tensor:
        """Return scores of groups, by which a selection keeps what stays, then what grows; for methods that regrow."""
        raise NotImplementedError

    def check_steps(self, every: int, steps: int) -> None:
        """Raise `RecipeError` if so short a training leaves the method nothing to do.

        Args:
            every: steps between two renewals of the masks.
            steps: of the training.
        """

    def own_selection(self) -> Selection | None:
        """Return the selection that the method is defined with, or None for the general default."""
        return None

    def shared_state(self, parameters: int) -> dict[str, Tensor]:
        """Return the tensors of this method that have to survive in a checkpoint; they are updated in place.

        Args:
            parameters: number of weights in the group.
        """
        return {}

    def penalty(self, scores: Sequence[Tensor]) -> Tensor:
        """Return what is to be added to the loss, a scalar; for methods that are `penalized`."""
        raise NotImplementedError

    def adapt(self, threshold: float | None, level: float) -> None:
        """Learn how the last selection went.

        Args:
            threshold: the score at the cut, None if nothing was cut.
            level: sparsity of the moment as a share of the final one, in [0, 1].
        """

    def logs(self, threshold: float | None) -> dict[str, float]:
        """Return numbers worth logging about the last selection."""
        return {} if threshold is None else {"threshold": threshold}
