"""Base of the tasks whose Trainer is that of transformers: examples with labels, a model with a head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer

from ...hf.auto import check_length, dropout_options, load_tokenizer
from ...hf.hub.model_card import card_text, facts_of, write_card
from ...hf.trainer.teacher_cache import batches_of
from ..data import LabelledExamples, load_examples
from ..metrics import DEFAULT, build_metrics, check_metrics
from ..task import Setup, Task


class LabelledTask(Task):
    """Labels and a head for them."""

    trainer_class: ClassVar[type[Trainer]] = Trainer

    def default_metric(self, section: Any) -> str:
        return DEFAULT[self.predicts(section)]

    def check_metrics(self, names: Sequence[str]) -> tuple[str, ...]:
        return check_metrics(names)

    def load_examples(self, recipe: Any) -> LabelledExamples:
        return load_examples(recipe.data, self.predicts(recipe.model))

    def options(self, section: Any) -> dict[str, Any]:
        """Return options for `from_pretrained` that the model section says."""
        name, revision = section.name, section.revision or "main"
        return {} if section.dropout is None else dropout_options(name, revision, section.dropout)

    def load_head(self, section: Any, examples: LabelledExamples) -> Any:
        """Load the model with its head."""
        raise NotImplementedError

    def load_model(self, recipe: Any, examples: LabelledExamples) -> tuple[Any, PreTrainedTokenizerBase]:
        tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
        build_metrics(recipe.metric, self.predicts(recipe.model), tokenizer)  # refused before the model is loaded
        model = self.load_head(recipe.model, examples)
        check_length(recipe.data.max_length, model, tokenizer)
        return model, tokenizer

    def collator(self, setup: Setup) -> Any:
        """Return what makes padded batches of tokenized examples."""
        return DataCollatorWithPadding(setup.tokenizer)

    def datasets(self, setup: Setup) -> tuple[Dataset, Dataset]:
        """Return train and validation as the model takes them."""
        data = setup.recipe.data
        return setup.examples.tokenized(setup.tokenizer, data.max_length, data.max_target_length)

    def trainer(self, setup: Setup) -> Trainer:
        train, validation = self.datasets(setup)
        return self.trainer_class(
            model=setup.model,
            args=setup.arguments,
            data_collator=self.collator(setup),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=setup.tokenizer,
            compute_metrics=build_metrics(setup.recipe.metric, self.predicts(setup.recipe.model), setup.tokenizer),
            callbacks=list(setup.callbacks),
        )

    def teacher_batches(self, setup: Setup) -> Any:
        data = setup.recipe.data
        train, _ = setup.examples.tokenized(setup.tokenizer, data.max_length, data.max_target_length)
        accepted = inspect.signature(setup.model.forward).parameters
        return batches_of(train, self.collator(setup), accepted, setup.arguments.eval_batch_size)

    def write_card(self, output: Path) -> None:
        write_card(output, card_text(facts_of(output)))
