"""What the callbacks of hf_sparse share: they add to the logs of a Trainer before any reporter reads them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState


class LogsFirst(TrainerCallback):
    """A callback that runs before all others, so that reporters such as TensorBoard see what `on_log` adds."""

    def after_optimizer(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Move to the front of the Trainer's callbacks."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    @staticmethod
    def add_to_logs(logs: dict[str, Any], state: TrainerState, values: dict[str, float]) -> None:
        """Add values to a log entry and to its copy in the history of the state."""
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
