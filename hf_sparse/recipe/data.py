"""The examples of a recipe: read, labelled with numbers, and tokenized."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import RecipeError
from ..registry import nearest
from ..utils.text import shorten
from .metrics import Predicts
from .sections import FORMATS, DataSection

SUBSET_SEED = 0
"""Seed of `train_samples` and `validation_samples`: the same subset for every seed of the recipe."""


@dataclasses.dataclass(frozen=True)
class LabelledExamples:
    """Examples with their labels as numbers, or with target sequences.

    Args:
        train, validation: datasets with the text columns and "labels".
        names: the name of each class; empty where the labels are not classes.
        text_columns: the one or two columns that make one input.
    """

    train: Dataset
    validation: Dataset
    names: tuple[str, ...]
    text_columns: tuple[str, ...]

    def tokenized(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, max_target_length: int | None = None
    ) -> tuple[Dataset, Dataset]:
        """Return train and validation with token ids in place of examples, cut at the lengths and not padded."""
        to_be_written = isinstance(self.train[0]["labels"], str)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            examples = [batch[column] for column in self.text_columns]
            tokens = dict(tokenizer(*examples, truncation=True, max_length=max_length))
            if to_be_written:
                written = tokenizer(
                    text_target=batch["labels"], truncation=True, max_length=max_target_length or max_length
                )
                tokens["labels"] = written["input_ids"]
            return tokens

        columns = [*self.text_columns, *(["labels"] if to_be_written else [])]
        return (
            self.train.map(tokenize, batched=True, remove_columns=columns, desc="Tokenizing train"),
            self.validation.map(tokenize, batched=True, remove_columns=columns, desc="Tokenizing validation"),
        )


def load_examples(section: DataSection, predicts: Predicts = "class") -> LabelledExamples:
    """Read the examples and labels that a recipe names.

    Classes are numbered in the order of the dataset's own class names where it has them, else of the sorted labels of
    the training examples.

    Raises:
        RecipeError: for a file or dataset that cannot be read, a missing column, a missing text or label, labels that
            do not fit the task, or a validation label that no training text has.
    """
    train, validation = load_split(section, "train"), load_split(section, "validation")
    names: tuple[str, ...] = ()
    if predicts == "number":
        train, validation = _as_numbers(train, "train"), _as_numbers(validation, "validation")
    elif predicts == "text":
        train, validation = _as_texts(train, "train"), _as_texts(validation, "validation")
    else:
        classes, names = _classes(train)
        train, validation = _as_classes(train, classes, "train"), _as_classes(validation, classes, "validation")
    return LabelledExamples(train, validation, names, section.text_columns)


def load_images(section: DataSection) -> LabelledExamples:
    """Read the images and classes that a recipe names: files as they are stored, in the column `text`, and "labels".

    Raises:
        RecipeError: as `load_examples`; or for a column that holds no images.
    """
    column, splits = section.text_columns[0], []
    if len(section.text_columns) != 1:
        raise RecipeError(f"`data.text` must be the one column with the images, got {shorten(section.text)}")
    for split in ("train", "validation"):
        dataset = _columns(_read(section, split), section, split, (column,), section.label, kind="images")
        if not _holds_images(dataset.features[column]):
            raise RecipeError(
                f"data.{split}: column '{column}' holds no images: it must be one of images, or of their files as "
                f"bytes, got {dataset.features[column]}"
            )
        splits.append(dataset.cast_column(column, datasets.Image(decode=False)))
    classes, names = _classes(splits[0])
    train, validation = (
        _as_classes(part, classes, of) for part, of in zip(splits, ("train", "validation"), strict=True)
    )
    return LabelledExamples(train, validation, names, (column,))


def _holds_images(feature: Any) -> bool:
    stored = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return stored or isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def load_split(section: DataSection, split: str) -> Dataset:
    """Read the examples of one split, with "labels" as they are in the data.

    Args:
        split: "train" or "validation".

    Raises:
        RecipeError: for a file or dataset that cannot be read, a missing column, or a missing text or label.
    """
    return read_columns(section, split, section.text_columns, section.label)


def read_columns(section: DataSection, split: str, texts: Sequence[str], label: str | None) -> Dataset:
    """Read some columns of one split, with the label renamed to "labels".

    Args:
        split: "train", "validation" or "reference".
        sentences: columns with text.
        label: None = without one.

    Raises:
        RecipeError: for a file or dataset that cannot be read, a missing column, or a missing text or label.
    """
    return _columns(_read(section, split), section, split, texts, label)


def read_rows(path: str, columns: Sequence[str]) -> Dataset:
    """Read columns of text of a local file, with nothing missing.

    Raises:
        RecipeError: for a file that cannot be read, a missing column, or a text that is missing.
    """
    section = DataSection(train=path, validation="none", text=list(columns), label=f"not {columns[0]}")
    return read_columns(section, "train", section.text_columns, None)


def _read(section: DataSection, split: str) -> Dataset:
    given = getattr(section, split)
    if section.name is None:
        return _read_file(given, f"data.{split}")
    with _readable(f"data.{split}", f"{given or split} of {section.name}"):
        return datasets.load_dataset(section.name, section.config, split=given or split)


def _read_file(path: str, where: str) -> Dataset:
    suffix = Path(path).suffix.lower()
    if Path(path).is_dir():  # of images, in a folder for each class
        with _readable(where, f"the folder {path}"):
            return datasets.load_dataset("imagefolder", data_dir=path, split="train")
    if suffix not in FORMATS:
        raise RecipeError(f"`{where}` must be a file with suffix {', '.join(FORMATS)}, got {path}")
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    with _readable(where, f"{path} of local data"):
        # A name is that of one file, also where it would match others as a pattern.
        return datasets.load_dataset(FORMATS[suffix], data_files=glob.escape(path), split="train", **options)


@contextlib.contextmanager
def _readable(where: str, source: str) -> Iterator[None]:
    """Turn what datasets raises for a file that cannot be read into a `RecipeError`."""
    try:
        yield
    except StopIteration as error:  # how datasets takes an empty file of JSON
        raise RecipeError(f"{where} has no rows") from error
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise RecipeError(f"{where}: cannot read {source}: {error.__cause__ or error}") from error


def read_column(path: str, column: str = "text") -> list[str]:
    """Read sequences without labels: the lines of a text file that are not empty, or a column of any other.

    Raises:
        RecipeError: for a file that cannot be read, has no such column, or holds anything but strings there.
    """
    if Path(path).suffix.lower() in ("", ".txt"):
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the corpus {path}: {error}") from error
        return [line for line in lines if line.strip()]
    dataset = _read_file(path, "--data")
    if column not in dataset.column_names:
        known = ", ".join(dataset.column_names)
        raise RecipeError(
            f"{path} has no column '{column}'{nearest(column, dataset.column_names)} Its columns: {known}."
        )
    found = [value for value in dataset[column] if value is not None]
    if not all(isinstance(value, str) for value in found):
        wrong = next(value for value in found if not isinstance(value, str))
        raise RecipeError(f"{path}: column '{column}' holds {wrong!r:.80}, which is not text")
    return found


def _columns(
    dataset: Dataset,
    section: DataSection,
    split: str,
    texts: Sequence[str],
    label: str | None,
    kind: Literal["text", "images"] = "text",
) -> Dataset:
    """Return the examples and "labels" only, at most the requested number, with nothing missing."""
    wanted = [*texts, *([] if label is None else [label])]
    for column in wanted:
        if column not in dataset.column_names:
            known = ", ".join(dataset.column_names)
            raise RecipeError(
                f"data.{split} has no column '{column}'{nearest(column, dataset.column_names)} Its columns: {known}."
            )
    dataset = dataset.select_columns(wanted)
    limit = getattr(section, f"{split}_samples", None)
    if limit is not None and limit < len(dataset):
        dataset = dataset.shuffle(seed=SUBSET_SEED).select(range(limit))
    if len(dataset) == 0:
        raise RecipeError(f"data.{split} has no rows")
    for column in wanted:
        missing = [row for row, value in enumerate(dataset[column]) if value is None]
        if missing:
            raise RecipeError(
                f"data.{split}: column '{column}' is empty in {len(missing)} rows, first in row {missing[0]}"
            )
    for column in texts if kind == "text" else ():
        if not isinstance(dataset[0][column], str):
            raise RecipeError(f"data.{split}: column '{column}' holds {dataset[0][column]!r}, which is not text")
    return dataset if label is None else dataset.rename_column(label, "labels")


def _classes(train: Dataset) -> tuple[list[Any], tuple[str, ...]]:
    """Return the values that stand for the classes, and the names of the classes."""
    feature = train.features["labels"]
    if isinstance(feature, datasets.ClassLabel):
        return list(range(feature.num_classes)), tuple(feature.names)
    values = sorted(train.unique("labels"))
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        raise RecipeError(
            f"the labels are fractions, such as {_first_fraction(values)}, not classes; for a regression write "
            "num_labels: 1 in the model section"
        )
    if len(values) < 2:
        raise RecipeError(f"all training examples have the same label {values[0]!r}, so there is nothing to learn")
    return values, tuple(str(int(value)) if isinstance(value, float) else str(value) for value in values)


def _first_fraction(values: Sequence[float]) -> float:
    return next(value for value in values if not float(value).is_integer())


def _as_classes(dataset: Dataset, classes: list[Any], split: str) -> Dataset:
    number = {value: index for index, value in enumerate(classes)}
    labels = list(dataset["labels"])
    for row, value in enumerate(labels):
        if value not in number:
            raise RecipeError(
                f"data.{split}: row {row} has label {value!r}, but the classes are {', '.join(map(repr, classes))}"
            )
    return _with_labels(dataset, [number[value] for value in labels], datasets.Value("int64"))


def _as_numbers(dataset: Dataset, split: str) -> Dataset:
    labels = list(dataset["labels"])
    for row, value in enumerate(labels):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecipeError(f"data.{split}: row {row} has label {value!r}, but a regression needs numbers")
    return _with_labels(dataset, [float(value) for value in labels], datasets.Value("float32"))


def _as_texts(dataset: Dataset, split: str) -> Dataset:
    if not isinstance(dataset[0]["labels"], str):
        raise RecipeError(f"data.{split}: row 0 has label {dataset[0]['labels']!r}, but task seq2seq generates text")
    return dataset


def _with_labels(dataset: Dataset, labels: list[Any], kind: Any) -> Dataset:
    return dataset.remove_columns("labels").add_column("labels", labels, feature=kind)
