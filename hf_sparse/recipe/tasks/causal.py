"""The next token of a text, by decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, default_data_collator

from ...errors import RecipeError
from ...hf.auto import load
from ..loss_metric import PerplexityOfLoss
from ..metrics import Predicts
from ..packed_text import PackedText, load_text
from ..task import TASKS, Setup
from .labelled import LabelledTask


@TASKS.register("causal-lm")
class CausalLM(LabelledTask):
    """A decoder; text is packed into sequences of `data.max_length`, which are their own labels."""

    takes_lora = True

    def predicts(self, section: Any) -> Predicts:
        return "token"

    def check_model(self, section: Any) -> None:
        if section.num_labels is not None:
            raise RecipeError(
                f"`model.num_labels` must be left out for `model.task` '{self.name}', which generates text, got "
                f"{section.num_labels}"
            )

    def default_arguments(self) -> Mapping[str, Any]:
        return {"prediction_loss_only": True}  # logits of all tokens would not fit into memory

    def load_examples(self, recipe: Any) -> PackedText:
        return load_text(recipe.data)

    def load_head(self, section: Any, examples: Any) -> Any:
        """Load the model, in float32: updates would be lost in the rounding of 16 bits.

        `bf16: true` in the training section computes in 16 bits all the same.

        Raises:
            RecipeError: if it cannot be loaded.
            CheckpointError: if it is packed, and corrupt.
        """
        options = {"dtype": torch.float32, **self.options(section)}
        return load(AutoModelForCausalLM, section.name, section.revision or "main", **options)

    def collator(self, setup: Setup) -> Any:
        """Return what makes batches: sequences are packed, so that none is shorter."""
        return default_data_collator

    def trainer(self, setup: Setup) -> Trainer:
        made = super().trainer(setup)
        made.compute_metrics = None
        made.add_callback(PerplexityOfLoss())
        return made
