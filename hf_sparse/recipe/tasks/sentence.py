"""Base of the tasks whose model and Trainer are those of sentence-transformers: sentences, and no head of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ...errors import RecipeError
from ...hf.auto import check_length, dropout_options
from ...hf.embedding.pooling import load_sentence_transformer
from ...hf.embedding.training import evaluator, length_batches, trainer_of, training_arguments
from ...hf.embedding.wrapper import inner_model
from ...hf.hub.sentence_card import add_section
from ...hf.trainer.teacher import wrapper_batches
from ..metrics import Predicts
from ..ranking import check_ranking_metrics
from ..sentence_data import SentenceExamples, load_sentences
from ..task import Setup, Task


class SentenceTask(Task):
    """A model of sentence-transformers.

    Attributes:
        kind: name of its class.
        labelled: whether the training examples have labels.
    """

    wraps: ClassVar[bool] = True
    kind: ClassVar[str]
    labelled: ClassVar[bool] = False
    knn: ClassVar[bool] = False

    def arguments(self) -> type[TrainingArguments]:
        return training_arguments(self.kind)

    def predicts(self, section: Any) -> Predicts:
        return "number"

    def default_metric(self, section: Any) -> str:
        return "spearman"

    def check_metrics(self, names: Sequence[str]) -> tuple[str, ...]:
        return check_ranking_metrics(names, self.knn)

    def check_model(self, section: Any) -> None:
        if section.num_labels is not None:
            raise RecipeError(f"model.num_labels is for classes, but model.task {self.name} has none")

    def check_data(self, section: Any) -> None:
        if section.label in section.validation_columns:
            raise RecipeError(
                f"`data.label` must be another column than `data.validation_text`, got '{section.label}' for both"
            )

    def load_examples(self, recipe: Any) -> SentenceExamples:
        return load_sentences(recipe.data, recipe.metric, self.labelled)

    def options(self) -> dict[str, Any]:
        """Return more options of the model's class."""
        return {}

    def load_model(self, recipe: Any, examples: SentenceExamples) -> tuple[Any, PreTrainedTokenizerBase]:
        section = recipe.model
        options: dict[str, Any] = {"revision": section.revision, "device": "cpu", **self.options()}
        if section.dropout is not None:
            options["config_kwargs"] = dropout_options(section.name, section.revision or "main", section.dropout)
        model = load_sentence_transformer(section.name, self.kind, **options)
        check_length(recipe.data.max_length, inner_model(model), model.tokenizer)
        return model, model.tokenizer

    def metrics(self, model: Any, recipe: Any, examples: SentenceExamples, batch: int) -> dict[str, float]:
        """Measure a model on the validation examples."""
        raise NotImplementedError

    def loss(self, setup: Setup) -> Any:
        """Return the loss of the Trainer; None = its own default."""
        return None

    def trainer(self, setup: Setup) -> Trainer:
        recipe = setup.recipe
        longest, batch = setup.model.max_seq_length, setup.arguments.per_device_eval_batch_size
        setup.arguments.batch_sampler = length_batches  # type: ignore[attr-defined]
        made: Trainer = trainer_of(
            self.kind,
            model=setup.model,
            args=setup.arguments,
            train_dataset=setup.examples.train,
            evaluator=evaluator(lambda model: self.metrics(model, recipe, setup.examples, batch)),
            loss=self.loss(setup),
            callbacks=list(setup.callbacks),
            max_length=recipe.data.max_length if longest is None else min(longest, recipe.data.max_length),
        )
        return made

    def teacher_batches(self, setup: Setup) -> Any:
        trainer = self.trainer(setup)
        return wrapper_batches(trainer, trainer.train_dataset)

    def write_card(self, output: Path) -> None:
        add_section(output, self.kind)
