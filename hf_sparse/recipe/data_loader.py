"""Batches for a saved model, from a file of examples: for what looks at data without training."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RecipeError
from ..hf.auto import check_length
from .sections import DataSection


def has_labels(model: PreTrainedModel) -> bool:
    """Return whether a model has a head with labels: for a class or a number of a text, or one that writes a text."""
    return _writes(model) or type(model).__name__.endswith("ForSequenceClassification")


def _writes(model: PreTrainedModel) -> bool:
    return bool(model.config.is_encoder_decoder) and model.can_generate()


class TextBatches(Sized):
    """Go over sequences in order, as keyword arguments of the model without labels, on its device, in each pass.

    Args:
        model: whatever its head.
        tokenizer: of the model.
        rows: examples in the columns of `section`.
        section: which columns, and how long.
        batch: examples at once.

    Raises:
        RecipeError: if batch is below 1, or the model takes fewer tokens than the section keeps.
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
        self.model, self.tokenizer, self.rows, self.section, self.size = model, tokenizer, rows, section, batch
        check_length(section.max_length, model, tokenizer)
        self._prepare()

    def _prepare(self) -> None:
        """Check more of the model, and set what depends on it."""

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        collate = self._collator()
        for start in range(0, len(self.rows), self.size):
            examples = self.rows[start : start + self.size]
            tokens = self.tokenizer(
                *(examples[column] for column in self.section.text_columns),
                truncation=True,
                max_length=self.section.max_length,
            )
            columns = {**tokens, **self._more(examples, start)}
            count = len(tokens["input_ids"])
            batch = collate([{key: values[place] for key, values in columns.items()} for place in range(count)])
            device = "cpu" if self.model.device.type == "meta" else self.model.device
            yield {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}

    def _collator(self) -> Any:
        return DataCollatorWithPadding(self.tokenizer)

    def _more(self, examples: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
        """Return more columns of a batch that begins at a row."""
        return {}


class LabelledBatches(TextBatches):
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

    def _prepare(self) -> None:
        if not has_labels(self.model):
            raise RecipeError(
                f"{type(self.model).__name__} gives no class or number for a text, and does not write one as T5 does, "
                "so there are no labels to measure it by; give a model fine-tuned for the task"
            )
        self.writes = _writes(self.model)
        self.size = 1 if self.writes else self.size

    def _collator(self) -> Any:
        return DataCollatorForSeq2Seq(self.tokenizer, self.model) if self.writes else super()._collator()

    def _more(self, examples: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
        return {"labels": self._labels(examples["labels"], start)}

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
