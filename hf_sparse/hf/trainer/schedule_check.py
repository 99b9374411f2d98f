"""What a schedule and the arguments of a Trainer must agree on, checked before the first step."""

from __future__ import annotations

import math

from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ...errors import RecipeError
from ...pruning.group import PruningGroup
from ...pruning.pruner import Pruner

logger = logging.get_logger(__name__)

SHORT_RAMP = 1000
"""Learned scores start at zero. With a ramp that ends before this step, movement was at chance level in our trials."""


def check_schedule(group: PruningGroup, steps: int) -> None:
    """Raise `RecipeError` if the schedule cannot be followed in this many steps; warn where learning will suffer."""
    schedule = group.schedule
    ramp = int(schedule.end * steps) - int(schedule.begin * steps)
    if schedule.end > schedule.begin and ramp < 1:
        raise RecipeError(
            f"schedule '{schedule.name}' rises from {schedule.begin:g} to {schedule.end:g} of the training, which is "
            f"less than one of its {steps} steps. Train longer, widen the ramp, or use schedule 'constant'"
        )
    if schedule.end > schedule.begin and schedule.every > ramp:  # without a ramp there is none to jump over
        raise RecipeError(
            f"schedule '{schedule.name}' renews the masks every {schedule.every} steps, but its ramp has {ramp} of the "
            f"{steps} steps of this training, so it would be jumped over. Lower 'every'"
        )
    group.scorer.check_steps(schedule.every, steps)
    last = math.ceil(schedule.end * steps)
    if group.scorer.source == "training" and group.sparsity > 0 and last < SHORT_RAMP:
        logger.warning(
            f"scorer '{group.scorer.name}' learns its scores from zero, and this schedule ends its ramp at step {last} "
            f"of {steps}. With fewer than about {SHORT_RAMP} steps the scores are mostly noise at high sparsity and "
            "accuracy collapses; train longer, or use scorer 'magnitude'"
        )


def check_best_model(pruner: Pruner, args: TrainingArguments, state: TrainerState) -> None:
    """Raise `RecipeError` if no evaluation happens at the final sparsity, so that no best model could be chosen."""
    end = max((group.schedule.end for group in pruner.groups), default=0.0)
    by_steps = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "steps"
    # transformers evaluates after the very last step whatever the interval is, but never before eval_delay.
    if args.eval_delay > (state.max_steps if by_steps else state.num_train_epochs):
        raise RecipeError(
            f"load_best_model_at_end needs an evaluation at the final sparsity, which holds from step "
            f"{math.ceil(end * state.max_steps)} of {state.max_steps} on, but eval_delay={args.eval_delay} puts the "
            "first one behind the end of training. Lower eval_delay"
        )
