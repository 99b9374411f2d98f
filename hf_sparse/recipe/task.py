"""What a model can be fine-tuned for: the base of a task, and the registry that `tasks` fills."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from ..errors import RecipeError
from ..registry import Registry
from .metrics import Predicts

TASKS: Registry[Any] = Registry("task")


class Examples(Protocol):
    """The data of a recipe as a task has read it.

    Attributes:
        train, validation: what is trained on, and what the metric is measured on.
        names: of the classes; empty where the labels are not classes.
    """

    @property
    def train(self) -> Dataset: ...

    @property
    def validation(self) -> Dataset: ...

    @property
    def names(self) -> tuple[str, ...]: ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a Trainer is made of.

    Args:
        recipe: the `Recipe`.
        arguments: of the Trainer.
        model, tokenizer, examples: as the task has loaded them.
        callbacks: in this order.
    """

    recipe: Any
    arguments: TrainingArguments
    model: Any
    tokenizer: PreTrainedTokenizerBase
    examples: Any
    callbacks: Sequence[TrainerCallback]


class Task:
    """Base of a task; register it with `TASKS`.

    Attributes:
        name: set by the registration.
        wraps: whether the model is one of sentence-transformers, which writes its own card.
        takes_lora: whether low-rank updates can train in place of the model.
    """

    name: ClassVar[str]
    wraps: ClassVar[bool] = False
    takes_lora: ClassVar[bool] = False

    def arguments(self) -> type[TrainingArguments]:
        """Return the class of the training arguments."""
        return TrainingArguments

    def default_arguments(self) -> Mapping[str, Any]:
        """Return training arguments that a recipe need not spell out."""
        return {}

    def check_model(self, section: Any) -> None:
        """Raise `RecipeError` for a `ModelSection` that does not fit the task."""

    def check_data(self, section: Any) -> None:
        """Raise `RecipeError` for a `DataSection` that does not fit the task."""
        for key in ("validation_text", "reference", "candidates"):
            if getattr(section, key) is not None:
                raise RecipeError(f"data.{key} is for the tasks embedding and reranking, got model.task {self.name}")

    def predicts(self, section: Any) -> Predicts:
        """Return what comes out of the model of a `ModelSection`."""
        raise NotImplementedError

    def default_metric(self, section: Any) -> str:
        """Return the metric of a recipe that names none."""
        raise NotImplementedError

    def check_metrics(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of metrics with aliases replaced; raise `RecipeError` for one that is not known."""
        raise NotImplementedError

    def load_examples(self, recipe: Any) -> Any:
        """Read the data of a recipe."""
        raise NotImplementedError

    def load_model(self, recipe: Any, examples: Any) -> tuple[Any, PreTrainedTokenizerBase]:
        """Load model and tokenizer of a recipe."""
        raise NotImplementedError

    def trainer(self, setup: Setup) -> Trainer:
        """Return the Trainer of a run; its `evaluate` gives the metrics."""
        raise NotImplementedError

    def teacher_batches(self, setup: Setup) -> Any:
        """Yield all training examples in batches, as keyword arguments of the teacher."""
        raise NotImplementedError

    def write_card(self, output: Path) -> None:
        """Write the model card of a finished run, or what sparsity adds to it.

        Raises:
            RecipeError: if the card was edited by hand.
        """
        raise NotImplementedError
