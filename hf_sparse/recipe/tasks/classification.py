"""Classes of a text or a pair of sentences, or one number (regression)."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSequenceClassification

from ...errors import RecipeError
from ...hf.auto import load
from ..data import LabelledExamples
from ..metrics import Predicts
from ..task import TASKS
from .labelled import LabelledTask


@TASKS.register("sequence-classification")
class SequenceClassification(LabelledTask):
    """A head with one output for each class of the data; with `num_labels: 1`, one number."""

    def predicts(self, section: Any) -> Predicts:
        return "number" if section.num_labels == 1 else "class"

    def load_head(self, section: Any, examples: LabelledExamples) -> Any:
        """Load the model with a head for the classes of the data, or for one number.

        Raises:
            RecipeError: if it cannot be loaded, or is to have another number of classes than the data.
            CheckpointError: if it is packed, and corrupt.
        """
        if self.predicts(section) == "number":
            head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        else:
            if section.num_labels not in (None, len(examples.names)):
                raise RecipeError(
                    f"model.num_labels is {section.num_labels}, but the training examples have {len(examples.names)} "
                    f"classes: {', '.join(examples.names)}"
                )
            head = {
                "id2label": dict(enumerate(examples.names)),
                "label2id": {name: i for i, name in enumerate(examples.names)},
            }
        return load(
            AutoModelForSequenceClassification,
            section.name,
            section.revision or "main",
            **head,
            **self.options(section),
        )
