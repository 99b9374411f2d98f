"""Warm-up of learned scores: their learning rate times a factor, in the moment of the optimizer's step and only then.

Whoever schedules or logs the rate sees it as scheduled, and nothing is added to the optimizer's state: the factor comes
from the progress of the run, so that a resumed run has it too, whatever the scheduler is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def warm_up(optimizer: torch.optim.Optimizer, factors: Callable[[], Mapping[Tensor, float]]) -> None:
    """Multiply the learning rate of groups in every step of an optimizer.

    Args:
        optimizer: with the parameters in groups of their own.
        factors: returns for each parameter that warms up the current factor of its learning rate; called before each
            step. A group is multiplied with the factor of its first parameter.
    """
    scheduled: list[tuple[dict[str, Any], Any]] = []

    def restore(*_: Any) -> None:
        for group, rate in scheduled:
            group["lr"] = rate
        scheduled.clear()

    def scale(*_: Any) -> None:
        restore()  # after a step that has failed, nobody has been here
        current = factors()
        for group in optimizer.param_groups:
            factor = current.get(group["params"][0], 1.0) if group["params"] else 1.0
            if factor != 1.0:
                scheduled.append((group, group["lr"]))
                group["lr"] = group["lr"] * factor

    optimizer.register_step_pre_hook(scale)
    optimizer.register_step_post_hook(restore)
