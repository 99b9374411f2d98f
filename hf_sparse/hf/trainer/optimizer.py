"""Learned scores in the Trainer's optimizer: their own parameter group, from the moment the optimizer exists.

Callbacks of transformers get no event when the optimizer is made, and later is too late: the learning-rate scheduler
counts groups when it is made, and a resumed run loads the optimizer's state before `on_train_begin`. So
`Trainer.create_optimizer` is wrapped (see `hf.patches`). For a Trainer without such a callback the wrapper changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from transformers import Trainer

from ...errors import RecipeError
from ...pruning.pruner import Pruner
from .. import patches

REFUSED = {
    "galore": "it picks weights by name and module type, which masks change",
    "apollo": "it picks weights by name and module type, which masks change",
    "lomo": "it updates during backward and has no parameter groups",
    "adalomo": "it updates during backward and has no parameter groups",
    "schedule_free": "the weights it evaluates are not the ones it trains, so masks would belong to the others",
}


@runtime_checkable
class TakesPart(Protocol):
    """A callback that wants to see the Trainer before and after the optimizer is made."""

    def before_optimizer(self, trainer: Trainer) -> None:
        """Called before the optimizer is made and before the model is wrapped."""

    def after_optimizer(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Called with the optimizer, before the learning-rate scheduler is made and any state is loaded."""


def create_optimizer(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Wrap `Trainer.create_optimizer`: callbacks that take part are called before and after it."""
    listeners = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TakesPart)]
    for listener in listeners:
        listener.before_optimizer(trainer)
    optimizer = original(trainer, *args, **kwargs)
    for listener in listeners:
        listener.after_optimizer(trainer, optimizer)
    return optimizer


patches.wrap(Trainer, "create_optimizer", create_optimizer)


def check_optimizer(name: str) -> None:
    """Raise `RecipeError` for an optimizer of `TrainingArguments.optim` that cannot train a masked model."""
    for family, reason in REFUSED.items():
        if name == family or name.startswith(f"{family}_"):
            raise RecipeError(
                f"optim='{name}' cannot be used with SparsityCallback: {reason}. Use adamw_torch, adafactor, sgd, lion "
                "or another optimizer with plain parameter groups"
            )


def group_scores(optimizer: torch.optim.Optimizer, pruner: Pruner, scheduler: Any = None) -> bool:
    """Move the learned scores into groups of their own: their learning rate, no weight decay, all else as default.

    The learning-rate scheduler scales their rate as it scales the others.

    Args:
        scheduler: one that was made before this, for the groups that the optimizer had then; None = made after this.

    Returns:
        Whether any were moved: not where there are none, or they have their groups since an earlier `train`.

    Raises:
        RecipeError: if the optimizer has no parameter groups to put them into, or the scheduler takes no more groups.
    """
    groups = pruner.score_groups()
    if not groups:
        return False
    if not isinstance(optimizer, torch.optim.Optimizer) or not all("lr" in group for group in optimizer.param_groups):
        raise RecipeError(
            f"{type(optimizer).__name__} has no parameter groups with a learning rate, which movement scores need. Use "
            "adamw_torch, or a scorer that learns nothing (magnitude)"
        )
    learned: set[int] = {id(parameter) for group in groups for parameter in _parameters(group)}
    for group in optimizer.param_groups:
        if group["params"] and all(id(parameter) in learned for parameter in group["params"]):
            return False  # a second call of train(), with the optimizer of the first
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in learned]
    if scheduler is not None:
        _check_extensible(scheduler)
    for group in groups:
        optimizer.add_param_group(group)
        if scheduler is not None:
            _extend(scheduler, optimizer)
    return True


EXTENSIBLE = (
    schedulers.ConstantLR,
    schedulers.CosineAnnealingLR,
    schedulers.CosineAnnealingWarmRestarts,
    schedulers.ExponentialLR,
    schedulers.LambdaLR,
    schedulers.LinearLR,
    schedulers.MultiStepLR,
    schedulers.PolynomialLR,
    schedulers.StepLR,
)
"""Schedulers whose state is a base rate (and a function) per parameter group. Those of transformers are LambdaLR."""


def _check_extensible(scheduler: Any) -> None:
    if type(scheduler) not in EXTENSIBLE:
        raise RecipeError(
            f"the lr_scheduler given to the Trainer ({type(scheduler).__name__}) was made before the movement scores "
            "had their parameter group, and takes no more groups. Leave it out and set lr_scheduler_type, give one of "
            f"{', '.join(cls.__name__ for cls in EXTENSIBLE)}, or use a scorer that learns nothing (magnitude)"
        )


def _extend(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Let a scheduler know of the last parameter group, as if it had been there from the beginning."""
    first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
    base = last["initial_lr"] = float(last["lr"])
    scheduler.base_lrs.append(base)
    if isinstance(scheduler, schedulers.LambdaLR):
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])
        last["lr"] = base * scheduler.lr_lambdas[0](scheduler.last_epoch)
    elif first["initial_lr"]:
        last["lr"] = base * first["lr"] / first["initial_lr"]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _parameters(group: dict[str, Any]) -> list[nn.Parameter]:
    return list(group["params"])
