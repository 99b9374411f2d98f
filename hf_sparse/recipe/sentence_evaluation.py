"""What a model of sentence-transformers scores on the validation data of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .ranking import CORRELATIONS, KNN, cosine, is_ranked, knn_accuracy, rank_of, ranked, unit
from .sentence_data import SentenceExamples, as_class, queries_of

Encode = Callable[[list[str]], Any]
"""Makes one embedding for each text."""
Score = Callable[[list[tuple[str, str]]], Any]
"""Makes one score for each pair of sentences."""


def embedding_metrics(
    encode: Encode, examples: SentenceExamples, metrics: Sequence[str], candidates: int | None = None
) -> dict[str, float]:
    """Measure embeddings: cosines of pairs against their scores, ranked documents, nearest neighbours.

    Args:
        encode: of the model.
        metrics: see `ranking`.
        candidates: see `queries_of`.
    """
    rows, columns = examples.validation, examples.text_columns
    found: dict[str, float] = {}
    if any(name in CORRELATIONS for name in metrics):
        similarity = cosine(*(encode(list(rows[column])) for column in columns))
        truth = np.asarray(rows["labels"], dtype=np.float64)
        found |= {name: CORRELATIONS[name](similarity, truth) for name in metrics if name in CORRELATIONS}
    if any(is_ranked(name) for name in metrics):
        queries = queries_of(rows, columns, candidates)
        texts = list(dict.fromkeys(text for documents in queries.documents for text in documents))
        place = {text: index for index, text in enumerate(texts)}
        vectors, asked = unit(encode(texts)), unit(encode(queries.queries))
        lists = [
            (rank_of(vectors[[place[text] for text in documents]] @ query, relevance), relevance)
            for query, documents, relevance in zip(asked, queries.documents, queries.relevance, strict=True)
        ]
        found |= {name: ranked(name, lists) for name in metrics if is_ranked(name)}
    if KNN in metrics:
        assert examples.reference is not None
        column = columns[0]
        reference, asked = (unit(encode(list(data[column]))) for data in (examples.reference, rows))
        classes, truth = as_class(examples.reference["labels"]), as_class(rows["labels"])
        found[KNN] = knn_accuracy(asked @ reference.T, classes, truth)
    return {name: found[name] for name in metrics}


def reranking_metrics(
    score: Score, examples: SentenceExamples, metrics: Sequence[str], candidates: int | None = None
) -> dict[str, float]:
    """Measure a reranker: its scores of pairs against theirs, and the documents of each query in their order.

    Args:
        score: of the model.
        metrics, candidates: as in `embedding_metrics`.
    """
    rows, columns = examples.validation, examples.text_columns
    found: dict[str, float] = {}
    if any(name in CORRELATIONS for name in metrics):
        scores = np.asarray(score(list(zip(*(rows[column] for column in columns), strict=True))), dtype=np.float64)
        truth = np.asarray(rows["labels"], dtype=np.float64)
        found |= {name: CORRELATIONS[name](scores, truth) for name in metrics if name in CORRELATIONS}
    if any(is_ranked(name) for name in metrics):
        queries = queries_of(rows, columns, candidates)
        pairs = [
            (query, text) for query, texts in zip(queries.queries, queries.documents, strict=True) for text in texts
        ]
        scores, start, lists = np.asarray(score(pairs)), 0, []
        for relevance in queries.relevance:
            lists.append((rank_of(scores[start : start + len(relevance)], relevance), relevance))
            start += len(relevance)
        found |= {name: ranked(name, lists) for name in metrics if is_ranked(name)}
    return {name: found[name] for name in metrics}
