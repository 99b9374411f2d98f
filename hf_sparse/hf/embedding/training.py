"""Trainers of sentence-transformers: their classes by the kind of model, batches of like lengths, metrics of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainingArguments

from ...errors import RecipeError

MEGABATCH = 50
"""Batches that are shuffled and sorted by length together, as transformers does."""


def _package() -> Any:
    try:
        package = importlib.import_module("sentence_transformers")
        importlib.import_module("sentence_transformers.base.sampler")
        return package
    except ImportError as error:
        raise RecipeError(
            "the tasks embedding and reranking need sentence-transformers 6 or later: pip install "
            "'hf-sparse[embedding]'"
        ) from error


def training_arguments(kind: str) -> type[TrainingArguments]:
    """Return the class of training arguments for a kind of model, as "SentenceTransformer".

    Raises:
        RecipeError: without sentence-transformers.
    """
    found: type[TrainingArguments] = getattr(_package(), f"{kind}TrainingArguments")
    return found


def trainer_of(kind: str, max_length: int, **options: Any) -> Any:
    """Return the Trainer for a kind of model, which cuts training sentences at a length.

    Args:
        max_length: in tokens; the model is measured, and saved, with its own.
        **options: of the Trainer.
    """
    trainer = getattr(_package(), f"{kind}Trainer")(**options)
    if hasattr(trainer.data_collator, "max_length"):
        trainer.data_collator.max_length = max_length
    return trainer


def evaluator(measure: Callable[[Any], dict[str, float]]) -> Any:
    """Return an evaluator for a Trainer of sentence-transformers.

    Args:
        measure: returns metrics of a model by name.
    """
    base = importlib.import_module("sentence_transformers.base.evaluation").BaseEvaluator

    class Measured(base):  # type: ignore[misc, valid-type]
        """Metrics of the validation examples of a recipe."""

        def __call__(self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1) -> Any:
            training = model.training
            try:
                with torch.no_grad():
                    found = measure(model)
            finally:
                model.train(training)
            self.primary_metric = next(iter(found))
            self.store_metrics_in_model_card_data(model, found, epoch, steps)
            return dict(found)

    return Measured()


def length_batches(
    dataset: Dataset,
    batch_size: int,
    drop_last: bool,
    valid_label_columns: list[str] | None = None,
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> Any:
    """Return a batch sampler of sentences of like lengths, in another order in each epoch.

    Args:
        dataset: with sentences in all columns but the label.
        generator: draws the order, and is set anew in each epoch.
    """
    base = importlib.import_module("sentence_transformers.base.sampler").DefaultBatchSampler
    labels = set(valid_label_columns or ())
    columns = [dataset[name] for name in dataset.column_names if name not in labels]
    lengths = np.asarray([sum(len(text) for text in row) for row in zip(*columns, strict=True)])

    class LengthBatches(base):  # type: ignore[misc, valid-type]
        """Batches of like lengths."""

        def __iter__(self) -> Iterator[list[int]]:
            if self.generator is not None and self.seed is not None:
                self.generator.manual_seed(self.seed + self.epoch)
            yield from by_length(lengths, batch_size, drop_last, self.generator)

    order = torch.utils.data.SequentialSampler(dataset)
    return LengthBatches(
        order,
        batch_size=batch_size,
        drop_last=drop_last,
        valid_label_columns=valid_label_columns,
        generator=generator,
        seed=seed,
    )


def by_length(
    lengths: Any, batch_size: int, drop_last: bool = False, generator: torch.Generator | None = None
) -> Iterator[list[int]]:
    """Yield batches of examples of like lengths, in random order, each example once.

    Args:
        lengths: of all examples.

    Example:
        >>> batches = list(by_length([3, 9, 3, 9], 2, generator=torch.Generator().manual_seed(0)))
        >>> sorted(sorted(batch) for batch in batches)
        [[0, 2], [1, 3]]
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    found: list[list[int]] = []
    for start in range(0, len(order), MEGABATCH * batch_size):
        part = sorted(order[start : start + MEGABATCH * batch_size], key=lambda index: lengths[index])
        found += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    if drop_last:
        found = [batch for batch in found if len(batch) == batch_size]
    for place in torch.randperm(len(found), generator=generator).tolist():
        yield found[place]
