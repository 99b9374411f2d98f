"""Seconds per optimizer step of a training run."""

from __future__ import annotations

import statistics
import time
from typing import Any

from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """Times optimizer steps from the beginning of one to the beginning of the next.

    Whatever ran between two steps that is not training, such as an evaluation, takes that pair out.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._begun is not None:
            self.seconds.append(now - self._begun)
        self._begun = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = None

    @property
    def median(self) -> float:
        """Return the median seconds per step; NaN before the second step."""
        return statistics.median(self.seconds) if self.seconds else float("nan")
