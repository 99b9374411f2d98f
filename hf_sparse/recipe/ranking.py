"""Metrics of embeddings and rerankers: correlation of similarities, ranked lists, nearest neighbours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..registry import nearest
from .metrics import Array, pearson, spearman

CORRELATIONS: Mapping[str, Callable[[Array, Array], float]] = {"spearman": spearman, "pearson": pearson}
_RANKED = re.compile(r"(ndcg|mrr|recall)@([1-9]\d{0,3})")
KNN = "knn_accuracy"
NEIGHBOURS = 10
EXAMPLES = ("spearman", "pearson", "ndcg@10", "mrr@10", "recall@10", KNN)


def ndcg(relevance: Sequence[float], ideal: Sequence[float], k: int) -> float:
    """Return the discounted gain of the first k of a ranking, over that of the best ranking; 0 if nothing is relevant.

    Args:
        relevance: of the documents in their order, first the best.
        ideal: of all documents, in any order.

    Example:
        >>> round(ndcg([0, 1, 0], [1, 0, 0], 10), 4)
        0.6309

    Source: Jarvelin and Kekalainen 2002, with linear gains.
    """
    best = _gain(sorted(ideal, reverse=True)[:k])
    return _gain(relevance[:k]) / best if best else 0.0


def _gain(relevance: Sequence[float]) -> float:
    return float(sum(value / np.log2(place + 2) for place, value in enumerate(relevance)))


def mrr(relevance: Sequence[float], ideal: Sequence[float], k: int) -> float:
    """Return one over the place of the first relevant document among the first k, else 0.

    Example:
        >>> mrr([0, 0, 1, 1], [1, 1, 0, 0], 10)
        0.3333333333333333
    """
    return next((1.0 / (place + 1) for place, value in enumerate(relevance[:k]) if value > 0), 0.0)


def recall(relevance: Sequence[float], ideal: Sequence[float], k: int) -> float:
    """Return the fraction of the relevant documents that is among the first k; 0 if nothing is relevant.

    Example:
        >>> recall([1, 0, 1, 1], [1, 1, 1, 0], 2)
        0.3333333333333333
    """
    relevant = sum(value > 0 for value in ideal)
    return sum(value > 0 for value in relevance[:k]) / relevant if relevant else 0.0


RANKED: Mapping[str, Callable[[Sequence[float], Sequence[float], int], float]] = {
    "ndcg": ndcg,
    "mrr": mrr,
    "recall": recall,
}


def is_ranked(name: str) -> bool:
    """Return whether a metric is one of ranked lists, such as `ndcg@10`."""
    return _RANKED.fullmatch(name) is not None


def ranked(name: str, lists: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return the mean of a metric over queries.

    Args:
        name: as `ndcg@10`.
        lists: for each query the relevance of its documents as ranked, and of all its documents.
    """
    match = _RANKED.fullmatch(name)
    assert match is not None
    return float(np.mean([RANKED[match[1]](found, ideal, int(match[2])) for found, ideal in lists]))


def knn_accuracy(similarity: Array, classes: Array, truth: Array, neighbours: int = NEIGHBOURS) -> float:
    """Return how often most of the nearest examples have the class of a text; of equally many, the nearest one's.

    Args:
        similarity: of each text to each example.
        classes: of the examples.
        truth: classes of the sentences.

    Shapes: similarity `(sentences, examples)`.

    Example:
        >>> knn_accuracy(np.array([[0.9, 0.8, 0.1]]), np.array(["a", "a", "b"]), np.array(["a"]), 3)
        1.0
    """
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :neighbours]
    hits = 0
    for row, true in zip(classes[order], truth, strict=True):
        names, first, counts = np.unique(row, return_index=True, return_counts=True)
        best = min(range(len(names)), key=lambda place: (-counts[place], first[place]))
        hits += bool(names[best] == true)
    return hits / len(truth)


def check_ranking_metrics(names: Sequence[str], knn: bool) -> tuple[str, ...]:
    """Return the names without repeats.

    Args:
        knn: whether nearest neighbours can be searched.

    Raises:
        RecipeError: for no name at all, or one that is not known.
    """
    known = [name for name in EXAMPLES if knn or name != KNN]
    if not names:
        raise RecipeError(f"metric is empty; name one of {', '.join(known)}")
    for name in names:
        if name not in known and not is_ranked(name):
            raise RecipeError(
                f"unknown metric '{name}'{nearest(name, known)} Known: {', '.join(known)}, and ndcg, mrr and recall at "
                "any other number."
            )
    return tuple(dict.fromkeys(names))


def rank_of(scores: Array, relevance: Sequence[float]) -> list[float]:
    """Return the relevance of documents in the order of their scores, the best first; equal scores keep their order."""
    return [relevance[place] for place in np.argsort(-np.asarray(scores), kind="stable")]


def cosine(left: Any, right: Any) -> Array:
    """Return the cosine of each pair of rows.

    Shapes: both `(pairs, size)`; returns `(pairs,)`, float64.
    """
    return np.asarray((unit(left) * unit(right)).sum(axis=1))


def unit(rows: Any) -> Array:
    """Return rows of length 1, float64; a row of zeros stays one."""
    rows = np.asarray(rows, dtype=np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
