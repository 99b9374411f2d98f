"""Data of embeddings and rerankers: sentences without labels, pairs with a score, sentences with a class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from ..errors import RecipeError
from .data import read_columns
from .ranking import CORRELATIONS, KNN, is_ranked
from .sections import DataSection

CANDIDATES_SEED = 0
"""Seed of the candidates that are drawn for each query: the same for every seed of the recipe."""


@dataclasses.dataclass(frozen=True)
class SentenceExamples:
    """What embeddings and rerankers are trained and measured on.

    Args:
        train: sentences, and for a reranker "label".
        validation: the sentences that are measured, and "labels".
        reference: labelled sentences whose neighbours are requested for a class, with the column "text".
        text_columns: of the validation examples.
        names: empty; there are no classes.
    """

    train: Dataset
    validation: Dataset
    text_columns: tuple[str, ...]
    reference: Dataset | None = None
    names: tuple[str, ...] = ()


def load_sentences(section: DataSection, metrics: Sequence[str], labelled: bool) -> SentenceExamples:
    """Read the data of a recipe for embeddings or rerankers.

    Args:
        metrics: that are to be measured; they say which columns are needed.
        labelled: whether the training examples have labels.

    Raises:
        RecipeError: for a file or dataset that cannot be read, a missing column, text or label.
    """
    columns = section.validation_columns
    pairs = any(name in CORRELATIONS or is_ranked(name) for name in metrics)
    if pairs and len(columns) != 2:
        raise RecipeError(
            f"metric {', '.join(metrics)} is measured on pairs: data.validation_text must be two columns, got "
            f"{', '.join(columns)}"
        )
    if KNN in metrics and (pairs or len(columns) != 1 or section.reference is None):
        raise RecipeError(
            f"metric {KNN} is measured on single sentences with classes, by itself: give data.validation_text one "
            "column, and data.reference the file of labelled sentences whose neighbours are counted"
        )
    train = read_columns(section, "train", section.text_columns, section.label if labelled else None)
    validation = read_columns(section, "validation", columns, section.label)
    reference = None if section.reference is None else read_columns(section, "reference", columns, section.label)
    if pairs:
        for row, value in enumerate(validation["labels"]):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise RecipeError(f"data.validation: row {row} has label {value!r}, but pairs need a number")
    if labelled:
        train = _scaled(train)
    return SentenceExamples(train, validation, columns, reference)


def _scaled(train: Dataset) -> Dataset:
    """Return training pairs with labels in [0, 1], as a reranker's loss has them, in the column "label"."""
    values = list(train["labels"])
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise RecipeError(f"data.train: row {row} has label {value!r}, but a reranker needs numbers from 0 on")
    top = max(values)
    if top <= 0:
        raise RecipeError("data.train: all labels are 0, so there is nothing to learn")
    scaled = [value / max(top, 1) for value in values]
    return train.remove_columns("labels").add_column("label", scaled, feature=datasets.Value("float32"))


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries with the documents that are ranked for them.

    Args:
        queries: sentences.
        documents: for each query, the candidates.
        relevance: of each candidate.
    """

    queries: list[str]
    documents: list[list[str]]
    relevance: list[list[float]]


def queries_of(validation: Dataset, columns: Sequence[str], candidates: int | None) -> Queries:
    """Return the queries of pairs (query, document, relevance); those without a relevant document are left out.

    Args:
        candidates: documents of other queries that are drawn beside a query's own; None = all of them.

    Raises:
        RecipeError: if no query has a relevant document.
    """
    own: dict[str, dict[str, float]] = {}
    for query, document, value in zip(
        validation[columns[0]], validation[columns[1]], validation["labels"], strict=True
    ):
        known = own.setdefault(query, {})
        known[document] = max(float(value), known.get(document, 0.0))
    corpus = list(dict.fromkeys(document for known in own.values() for document in known))
    drawn = np.random.default_rng(CANDIDATES_SEED)
    found = Queries([], [], [])
    for query, known in own.items():
        if not any(value > 0 for value in known.values()):
            continue
        others = [document for document in corpus if document not in known and document != query]
        if candidates is not None and candidates < len(others):
            others = [others[place] for place in sorted(drawn.choice(len(others), candidates, replace=False))]
        documents = [*known, *others]
        order = drawn.permutation(len(documents))  # so that no order of the file ranks them
        found.queries.append(query)
        found.documents.append([documents[place] for place in order])
        found.relevance.append([known.get(documents[place], 0.0) for place in order])
    if not found.queries:
        raise RecipeError("data.validation: no pair has a label above 0, so no query has a relevant document")
    return found


def as_class(values: Any) -> np.ndarray[Any, Any]:
    """Return labels as an array of strings, so that classes compare equal whatever their type in a file."""
    return np.asarray([str(value) for value in values])
