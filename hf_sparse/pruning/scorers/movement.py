"""Movement pruning: weights that training moves towards zero matter least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...config.sparsity import SCORERS
from ...utils.validation import check_number
from ..selection import Selection, Threshold
from ..state_fields import shared_field
from .base import Group, LearnedScorer


@SCORERS.register("movement")
@dataclasses.dataclass
class Movement(LearnedScorer):
    """Learn one score per group by the straight-through gradient: `S <- S - lr * (dL/dW' * W)`, summed over the group.

    `W' = W * M` is the masked weight, and `W` in the product is the *unmasked* one, so a removed weight goes on
    learning its score, keeps its value, and comes back with it when the score rises.

    Args:
        learning_rate: of the scores; it follows the schedule of the weights' own learning rate.
        warmup: fraction of the training over which the scores' rate rises from 0, in a straight line and on top of
            that schedule; 0 = not at all. It keeps the first steps, when a new task head sends large gradients of
            little meaning down, from deciding the order. (No paper that we know of has it: in Sanh et al. and Lagunas
            et al. the scores follow the weights' own warm-up, as they do here with 0.)
        dtype: "float32", or "bfloat16" for half of the memory of the scores, their gradients and what the optimizer
            keeps of them: with AdamW 8 bytes per group instead of 16. It is coarse. A score moves while its step is
            more than 1/256 of it, which with AdamW and the default rate holds up to 4; AdamW's average of squared
            gradients rises but hardly falls; and of scores that become equal, those with the lower index are kept.

    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", eq. 3-5.
    """

    learning_rate: float = 1e-2
    warmup: float = 0.0
    dtype: str = "float32"


@SCORERS.register("soft_movement")
@dataclasses.dataclass
class SoftMovement(Movement):
    """Learn scores under a penalty that pulls them down, and keep what stays above one threshold.

    `M = 1[sigmoid(S) > tau]` for all weights of the group together, and the loss gains
    `lambda * mean over weights of mean(sigmoid(S))`. In the paper tau and lambda are set by hand and the sparsity is
    what comes out. Here the sparsity is what is requested: at each step tau is the value that leaves the scheduled
    fraction, and a controller adjusts lambda, instead of trial and error, to bring tau to the paper's (`threshold`). In
    a short run the scores cannot move that far; the sparsity is met all the same, and the logs say where tau ended.

    Args:
        learning_rate, warmup, dtype: of the scores, as in movement.
        threshold: where sigmoid(S) is to be cut at the end.
        penalty_strength: lambda to start from; None = the paper's 400 for BERT-base, scaled to the same pull on each
            score.

    Source: Sanh et al. 2020, section 4 (soft movement pruning); Lagunas et al. 2021, section 4.
    """

    fields = (*LearnedScorer.fields, shared_field("strength"), shared_field("level"))
    threshold: float = 0.1
    penalty_strength: float | None = None
    start: float = dataclasses.field(init=False, repr=False, compare=False)
    strength: Tensor = dataclasses.field(init=False, repr=False, compare=False)
    level: Tensor = dataclasses.field(init=False, repr=False, compare=False)

    _PAPER_STRENGTH = 400.0
    _PAPER_SCORES = 85e6  # weights in the encoder of BERT-base, for which the paper's value was tuned
    _GAIN = 0.02  # at a full unit of error, lambda doubles in 35 renewals of the masks
    _RANGE = 1e4  # lambda stays within this factor of where it started, whatever the error is

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, "(0, 1)")
        if self.penalty_strength is not None:
            check_number("penalty_strength", self.penalty_strength, "(0, inf)")

    def own_selection(self) -> Selection:
        return Threshold()

    def shared_state(self, parameters: int) -> dict[str, Tensor]:
        start = self.penalty_strength
        if start is None:
            start = self._PAPER_STRENGTH * parameters / self._PAPER_SCORES
        self.start = start
        self.strength = torch.tensor(start, dtype=torch.float64)
        self.level = torch.tensor(0.0, dtype=torch.float64)
        return {"strength": self.strength, "level": self.level}

    def penalty(self, scores: Sequence[Tensor]) -> Tensor:
        means = torch.stack([_mean_sigmoid(tensor).to(scores[0].device) for tensor in scores])
        return float(self.strength * self.level) * means.mean()

    def after_update(self, group: Group) -> None:
        self.adapt(group.selection.threshold, group.level)

    def adapt(self, threshold: float | None, level: float) -> None:
        """Set the penalty to the level of the schedule, and lambda by where the cut is.

        Args:
            threshold: the score at the cut, None if nothing was cut.
            level: sparsity of the moment as a fraction of the final one, in [0, 1].
        """
        self.level.fill_(level)
        if threshold is None:
            return
        # Where the cut should be by now: it sets out from S = 0, where all scores start, and arrives with the ramp.
        target = level * math.log(self.threshold / (1.0 - self.threshold))
        error = max(-1.0, min(1.0, threshold - target))
        self.strength *= math.exp(self._GAIN * error)
        self.strength.clamp_(self.start / self._RANGE, self.start * self._RANGE)

    def logs(self, threshold: float | None) -> dict[str, float]:
        # The sigmoid, written so that no score is too large for it.
        out = {} if threshold is None else {"threshold": 0.5 * (1.0 + math.tanh(0.5 * threshold))}
        return out | {"penalty_strength": float(self.strength * self.level)}


def _mean_sigmoid(scores: Tensor) -> Tensor:
    # In float32: a sum of bfloat16 numbers stops growing after some hundred.
    total = torch.sigmoid(scores).sum(dtype=torch.float32)
    return (total.full_tensor() if isinstance(total, DTensor) else total) / scores.numel()
