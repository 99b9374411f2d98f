"""The sections of a recipe that say which model and which examples; `recipe` puts them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..utils.text import shorten
from ..utils.validation import check_bool, check_number, check_one_of, check_positive_int, check_text
from .lora import check_lora
from .metrics import Predicts
from .task import TASKS, Task

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Suffixes of files with examples, and the loaders of `datasets` that read them."""


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Which model to fine-tune.

    Args:
        name: folder or Hub name. A recipe may write it alone, as in `model: bert-base-uncased`.
        task: "sequence-classification"; "seq2seq" for encoder-decoders such as T5, which generate text; "embedding" for
            a SentenceTransformer, which needs no labels; "reranking" for a CrossEncoder; "causal-lm" for decoders,
            which predict the next token of text that is packed into sequences of `data.max_length`;
            "image-classification" for images.
        num_labels: None = as many as the data has; 1 = regression.
        revision: branch, tag or commit on the Hub.
        fill: train the zeros of a pruned model again, see `hf_sparse.fill`.
        keep_zeros: keep the zeros of a dense model with zeros, see `hf_sparse.keep_zeros`; a packed one keeps them
            anyway.
        dropout: in place of every dropout of the model's config; None = as it is. 0 where a copy of the model teaches
            it: the teacher has none.
        lora: fields of `peft.LoraConfig`, as in `{r: 8, target_modules: all-linear}`: low-rank updates train beside the
            weights, which are frozen, and are merged at the end with the zeros kept. For "causal-lm".
    """

    name: str
    task: str = "sequence-classification"
    num_labels: int | None = None
    revision: str | None = None
    fill: bool = False
    keep_zeros: bool = False
    dropout: float | None = None
    lora: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_text("model.name", self.name)
        check_bool("model.fill", self.fill)
        check_bool("model.keep_zeros", self.keep_zeros)
        if self.fill and self.keep_zeros:
            raise RecipeError("model.fill trains the zeros and model.keep_zeros keeps them: give one of the two")
        check_one_of("model.task", self.task, TASKS)
        if self.num_labels is not None:
            check_positive_int("model.num_labels", self.num_labels)
        if self.dropout is not None:
            check_number("model.dropout", self.dropout, "[0, 1)")
        if self.revision is not None:
            check_text("model.revision", self.revision)
        if self.lora is not None:
            check_lora(self.lora)
            if not self.kind.takes_lora:
                raise RecipeError(f"`model.lora` is for `model.task` 'causal-lm', got '{self.task}'")
        self.kind.check_model(self)

    @property
    def kind(self) -> Task:
        """Return the task."""
        task: Task = TASKS.build(self.task)
        return task

    @property
    def predicts(self) -> Predicts:
        """Return what comes out of the model: a class, one number (regression), or text."""
        return self.kind.predicts(self)


@dataclasses.dataclass(frozen=True)
class DataSection:
    """Which examples to train and to measure on.

    Args:
        train: local json, jsonl, csv, tsv or parquet file, or a folder with a folder of images for each class; with
            `name`, a split (None = "train").
        validation: the same for the examples the metric is measured on; with `name`, None = "validation".
        name: dataset on the Hub; None for local files.
        config: configuration of that dataset ("sst2" of "glue").
        text: column with the text, or two columns for pairs; of task "image-classification", with the images.
        label: column with the label: integers, strings, fractions for regression, or the target text. Training examples
            of task "embedding" need none.
        validation_text: the same as `text` for the validation examples of embeddings and rerankers; None = `text`.
        reference: for the metric knn_accuracy of embeddings, labelled sentences in columns as the validation examples.
        candidates: for ranked metrics (ndcg@10), documents of other queries that are drawn beside those of a query;
            None = all.
        max_length: tokens kept of each example.
        max_target_length: tokens kept of a target sequence; None = `max_length`.
        train_samples, validation_samples: None = all; else a random subset of that size, the same for every seed.
    """

    train: str | None = None
    validation: str | None = None
    name: str | None = None
    config: str | None = None
    text: str | Sequence[str] = "text"
    label: str = "label"
    max_length: int = 128
    max_target_length: int | None = None
    train_samples: int | None = None
    validation_samples: int | None = None
    validation_text: str | Sequence[str] | None = None
    reference: str | None = None
    candidates: int | None = None

    def __post_init__(self) -> None:
        for key in ("train", "validation", "name", "config", "reference"):
            if getattr(self, key) is not None:
                check_text(f"data.{key}", getattr(self, key))
        check_text("data.label", self.label)
        for key, columns in (("text", self.text_columns), ("validation_text", self.validation_columns)):
            if len(columns) not in (1, 2) or not all(isinstance(column, str) and column for column in columns):
                raise RecipeError(
                    f"`data.{key}` must be a column name or a list of two, got {shorten(getattr(self, key))}"
                )
        check_positive_int("data.max_length", self.max_length)
        for key in ("max_target_length", "train_samples", "validation_samples", "candidates"):
            if getattr(self, key) is not None:
                check_positive_int(f"data.{key}", getattr(self, key))
        if self.label in self.text_columns:
            raise RecipeError(f"`data.label` must be another column than `data.text`, got '{self.label}' for both")
        self._check_source()

    def _check_source(self) -> None:
        if self.name is None:
            if self.config is not None:
                raise RecipeError(
                    f"`data.config` must be left out for local files, got {shorten(self.config)}. For a dataset on the "
                    "Hub, give `data.name` too"
                )
            for key in ("train", "validation"):
                if getattr(self, key) is None:
                    raise RecipeError(f"`data.{key}` is missing: give a file, or a dataset on the Hub with `data.name`")
        for key in ("train", "validation") if self.name is not None else ():
            split = getattr(self, key)
            if split is not None and Path(split).suffix.lower() in FORMATS:
                raise RecipeError(
                    f"`data.{key}` must be a split of the dataset '{self.name}', got the file {split}. To read local "
                    "files, leave `data.name` out (--set data.name=null --set data.config=null)"
                )
        if self.train == self.validation and self.train is not None:
            raise RecipeError(
                f"`data.validation` must be another file or split than `data.train`, got {shorten(self.train)} for "
                "both: the metric would be measured on the training examples"
            )

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the one or two columns that make one input."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @property
    def validation_columns(self) -> tuple[str, ...]:
        """Return the one or two columns of the validation examples."""
        given = self.validation_text
        return self.text_columns if given is None else (given,) if isinstance(given, str) else tuple(given)
