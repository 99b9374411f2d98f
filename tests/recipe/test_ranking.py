"""Metrics of embeddings and rerankers, by hand and against the evaluators of sentence-transformers (6.2.0)."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_sparse.errors import RecipeError
from hf_sparse.recipe.ranking import check_ranking_metrics, cosine, knn_accuracy, mrr, ndcg, rank_of, ranked, recall
from hf_sparse.recipe.sentence_data import SentenceExamples, queries_of
from hf_sparse.recipe.sentence_evaluation import embedding_metrics, reranking_metrics
from tests.helpers.sentence import package

TEXTS = [f"sentence {index}" for index in range(30)]


def vectors(texts: list[str]) -> np.ndarray[Any, Any]:
    """Random vectors that depend on the text alone."""
    return np.stack([np.random.default_rng(zlib.crc32(text.encode())).normal(size=8) for text in texts])


class Fake:
    """As much of a model of sentence-transformers as its evaluators need."""

    similarity_fn_name = "cosine"
    truncate_dim = None

    def __init__(self) -> None:
        from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

        self.model_card_data = SentenceTransformerModelCardData()

    def encode(self, texts: Any, **options: Any) -> Any:
        found = vectors(list(texts))
        return torch.from_numpy(found) if options.get("convert_to_tensor") else found

    encode_query = encode_document = encode

    def similarity(self, a: Any, b: Any) -> Any:
        from sentence_transformers.util import cos_sim

        return cos_sim(a, b)

    def predict(self, pairs: Any, **options: Any) -> Any:
        a, b = (vectors([pair[side] for pair in pairs]) for side in (0, 1))
        return cosine(a, b)


def examples(labels: list[float], one: list[str], two: list[str]) -> SentenceExamples:
    rows = Dataset.from_dict({"one": one, "two": two, "labels": labels})
    return SentenceExamples(rows, rows, ("one", "two"))


def test_correlations_are_those_of_the_similarity_evaluator() -> None:
    package()
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    labels = [float(index % 6) for index in range(15)]
    found = embedding_metrics(vectors, examples(labels, TEXTS[:15], TEXTS[15:]), ["spearman", "pearson"])
    theirs: Any = EmbeddingSimilarityEvaluator(TEXTS[:15], TEXTS[15:], labels, write_csv=False)(Fake())  # type: ignore[arg-type]
    assert found["spearman"] == pytest.approx(theirs["spearman_cosine"], abs=1e-6)
    assert found["pearson"] == pytest.approx(theirs["pearson_cosine"], abs=1e-6)


def test_retrieval_is_that_of_the_retrieval_evaluator() -> None:
    package()
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    queries, documents = TEXTS[:10], TEXTS[10:]
    one = [query for query in queries for _ in range(2)]
    labels = [1.0] * 20
    metrics = ["ndcg@10", "mrr@10", "recall@5"]
    found = embedding_metrics(vectors, examples(labels, one, documents), metrics)
    relevant = {str(place): {f"d{2 * place}", f"d{2 * place + 1}"} for place in range(10)}
    evaluator = InformationRetrievalEvaluator(
        {str(place): text for place, text in enumerate(queries)},
        {f"d{place}": text for place, text in enumerate(documents)},
        relevant, mrr_at_k=[10], ndcg_at_k=[10], precision_recall_at_k=[5], map_at_k=[10], accuracy_at_k=[1],
        write_csv=False,
    )  # fmt: skip
    theirs: Any = evaluator(Fake())  # type: ignore[arg-type]
    for name in metrics:
        assert found[name] == pytest.approx(theirs[f"cosine_{name}"], abs=1e-6), name


def test_reranking_is_that_of_the_reranking_evaluator() -> None:
    package()
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    one, two = [TEXTS[0]] * 8 + [TEXTS[1]] * 8, TEXTS[2:18]
    labels = [1.0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    rows = examples(labels, one, two)
    samples = [
        {
            "query": query,
            "positive": [t for q, t, y in zip(one, two, labels, strict=True) if q == query and y],
            "negative": [t for q, t, y in zip(one, two, labels, strict=True) if not (q == query and y)],
        }
        for query in TEXTS[:2]
    ]
    found = reranking_metrics(Fake().predict, rows, ["mrr@10", "ndcg@10"])
    theirs: Any = CrossEncoderRerankingEvaluator(samples, at_k=10, write_csv=False)(Fake())  # type: ignore[arg-type]
    assert found["mrr@10"] == pytest.approx(theirs["mrr@10"], abs=1e-6)
    assert found["ndcg@10"] == pytest.approx(theirs["ndcg@10"], abs=1e-6)


def test_by_hand() -> None:
    assert ndcg([0, 3, 0, 1], [3, 1, 0, 0], 10) == pytest.approx(
        (3 / np.log2(3) + 1 / np.log2(5)) / (3 + 1 / np.log2(3))
    )
    assert mrr([0, 0, 1], [1], 2) == 0.0
    assert recall([1, 0, 1], [1, 1, 1, 1], 3) == 0.5
    assert rank_of(np.array([0.1, 0.9, 0.9]), [1.0, 2.0, 3.0]) == [2.0, 3.0, 1.0]
    assert ranked("mrr@1", [([1.0], [1.0]), ([0.0], [1.0])]) == 0.5
    near = np.array([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]])
    assert knn_accuracy(near, np.array(["a", "b", "b"]), np.array(["b", "b"]), 3) == 1.0
    assert knn_accuracy(near, np.array(["a", "b", "b"]), np.array(["a", "b"]), 2) == 1.0  # one of each: the nearest


def test_candidates_are_drawn_once_and_never_a_relevant_document() -> None:
    rows = examples([1.0] * 10, TEXTS[:10], TEXTS[10:20]).validation
    first, second = (queries_of(rows, ("one", "two"), 3) for _ in range(2))
    assert first == second
    for place, (documents, relevance) in enumerate(zip(first.documents, first.relevance, strict=True)):
        assert len(documents) == len(set(documents)) == 4
        assert [text for text, value in zip(documents, relevance, strict=True) if value] == [TEXTS[10 + place]]


def test_a_query_without_a_relevant_document_is_left_out_and_all_of_them_an_error() -> None:
    rows = examples([1.0, 0.0], TEXTS[:2], TEXTS[2:4]).validation
    assert queries_of(rows, ("one", "two"), None).queries == TEXTS[:1]
    with pytest.raises(RecipeError, match="no pair has a label above 0"):
        queries_of(examples([0.0], TEXTS[:1], TEXTS[1:2]).validation, ("one", "two"), None)


def test_unknown_metrics_are_refused() -> None:
    assert check_ranking_metrics(["ndcg@3", "spearman", "ndcg@3"], knn=True) == ("ndcg@3", "spearman")
    for name in ("ndcg", "ndcg@0", "knn_accuracy", "map@10"):
        with pytest.raises(RecipeError, match=f"unknown metric '{name}'"):
            check_ranking_metrics([name], knn=False)
