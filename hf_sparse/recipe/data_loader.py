"""Batches with labels for a saved model, from a file of examples: for what looks at data without training."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RecipeError
from ..hf.auto import check_length
from .sections import DataSection


class LabelledBatches(Sized):
    """Go over examples in order, as keyword arguments of the model with labels, on its device, in each pass.

    Args:
        model: with a head for the task.
        tokenizer: of the model.
        rows: examples in the columns of `section`, and "labels".
        section: which columns, and how long.
        batch: examples at once; one at a time where the model generates text, as each has its own number of tokens.

    Raises:
        RecipeError: if batch is below 1, the model has no head for the task, or it takes fewer tokens than the
            section keeps; later if a label is not one of the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        section: DataSection,
        batch: int = 16,
    ) -> None:
        if batch < 1:
            raise RecipeError(f"`batch` must be a positive integer, got {batch}")
        self.model, self.tokenizer, self.rows, self.section = model, tokenizer, rows, section
        check_length(section.max_length, model, tokenizer)
        self.writes = bool(model.config.is_encoder_decoder) and model.can_generate()
        if not self.writes and not type(model).__name__.endswith("ForSequenceClassification"):
            raise RecipeError(
                f"{type(model).__name__} gives no class or number for a text, and does not write one as T5 does, so "
                "there are no labels to measure it by; give a model fine-tuned for the task"
            )
        self.size = 1 if self.writes else batch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        collate = (
            DataCollatorForSeq2Seq(self.tokenizer, self.model)
            if self.writes
            else DataCollatorWithPadding(self.tokenizer)
        )
        for start in range(0, len(self.rows), self.size):
            examples = self.rows[start : start + self.size]
            tokens = self.tokenizer(
                *(examples[column] for column in self.section.text_columns),
                truncation=True,
                max_length=self.section.max_length,
            )
            labels = self._labels(examples["labels"], start)
            features = [
                {**{key: values[place] for key, values in tokens.items()}, "labels": labels[place]}
                for place in range(len(labels))
            ]
            batch = collate(features)
            yield {key: value.to(self.model.device) for key, value in batch.items() if isinstance(value, Tensor)}

    def _labels(self, values: list[Any], start: int) -> list[Any]:
        if not self.writes:
            return [label_number(self.model, value, start + place) for place, value in enumerate(values)]
        length = self.section.max_target_length or self.section.max_length
        written = [str(value) for value in values]
        labels: list[Any] = self.tokenizer(text_target=written, truncation=True, max_length=length)["input_ids"]
        return labels


def label_number(model: PreTrainedModel, value: Any, row: int) -> int | float:
    """Return a label as the model counts it."""
    if model.config.num_labels == 1 and isinstance(value, (int, float)):
        return float(value)
    known: dict[str, Any] = dict(model.config.label2id or {})
    if isinstance(value, float) and value.is_integer() and str(value) not in known:
        value = int(value)  # as training takes it: a csv may say 1.0 for class 1
    if str(value) in known:
        return int(known[str(value)])
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < int(model.config.num_labels or 0):
        return value
    raise RecipeError(f"row {row} of the data has label {value!r}, but the model knows {', '.join(map(str, known))}")
