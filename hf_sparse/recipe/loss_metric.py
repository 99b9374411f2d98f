"""Perplexity in a Trainer that measures the loss alone: logits of all tokens would not fit into memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerCallback

from .metrics import perplexity


class PerplexityOfLoss(TrainerCallback):
    """Add the perplexity to what an evaluation of a causal language model has measured."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add it beside the loss, which is a mean over sequences of as many tokens each."""
        metrics: dict[str, float] = kwargs["metrics"]
        for key in [key for key in metrics if key.endswith("_loss")]:
            value = perplexity(np.array([-metrics[key]]), np.array([]))
            metrics[f"{key.removesuffix('loss')}perplexity"] = value
