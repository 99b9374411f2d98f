from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer, EvalPrediction

from hf_sparse.errors import RecipeError
from hf_sparse.recipe.metrics import (
    ALIASES,
    LOCAL,
    accuracy,
    build_metrics,
    check_metrics,
    f1,
    matthews,
    pearson,
    spearman,
    wer,
)

# Nine examples: 3 true positives, 1 false positive, 2 false negatives, 3 true negatives.
GUESSED = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0])
TRUE = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0])


def test_accuracy_is_the_fraction_that_is_right():
    assert accuracy(GUESSED, TRUE) == 6 / 9


def test_f1_of_two_classes_is_that_of_class_1():
    assert f1(GUESSED, TRUE) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))


def test_f1_of_three_classes_is_their_mean():
    # class 0: 1 hit of 1 and 2; class 1: 1 of 2 and 1; class 2: 1 of 1 and 1
    assert f1(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2])) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_f1_is_0_when_class_1_never_occurs():
    assert f1(np.zeros(3, int), np.zeros(3, int)) == 0.0


def test_matthews_of_two_classes_is_the_fourfold_correlation():
    # (TP TN - FP FN) / sqrt((TP+FP) (TP+FN) (TN+FP) (TN+FN))
    assert matthews(GUESSED, TRUE) == pytest.approx((3 * 3 - 1 * 2) / (4 * 5 * 4 * 5) ** 0.5)


def test_matthews_of_three_classes_is_gorodkins():
    # (c n - sum p_k t_k) / sqrt((n^2 - sum p_k^2) (n^2 - sum t_k^2)), c = 3 right of n = 4
    guessed, true = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2])
    assert matthews(guessed, true) == pytest.approx((3 * 4 - 5) / ((16 - 6) * (16 - 6)) ** 0.5)


@pytest.mark.parametrize("metric", [matthews, pearson, spearman])
def test_correlation_is_0_when_one_side_is_constant(metric):
    assert metric(np.array([1, 1, 1]), np.array([0, 1, 0])) == 0.0


def test_pearson_is_the_linear_correlation():
    # the deviations are -1, 0, 1 and minus four thirds, minus one third, five thirds
    expected = 3 / (2 * (16 + 1 + 25) / 9) ** 0.5
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])) == pytest.approx(expected)


def test_spearman_gives_equal_values_their_mean_rank():
    # ranks (1, 2.5, 2.5, 4) against (1, 2, 3, 4)
    assert spearman(np.array([1.0, 5.0, 5.0, 9.0]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)


def test_spearman_is_minus_1_for_reversed_order():
    assert spearman(np.array([3.0, 2.0, -7.0]), np.array([1, 20, 300])) == -1.0


def _classes(seed: int, count: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, count, 60)
    return np.where(generator.random(60) < 0.3, generator.integers(0, count, 60), labels), labels


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_classes_are_those_of_sklearn(seed: int, count: int) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    predictions, labels = _classes(seed, count)
    average = "binary" if count == 2 else "macro"
    assert 0 < accuracy(predictions, labels) < 1
    assert accuracy(predictions, labels) == pytest.approx(sklearn_metrics.accuracy_score(labels, predictions))
    assert f1(predictions, labels) == pytest.approx(sklearn_metrics.f1_score(labels, predictions, average=average))
    assert matthews(predictions, labels) == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, predictions))


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_scipy(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 11, 50) / 2  # with ties, as in STS-B
    predictions = np.round(labels + generator.normal(size=50), 1)
    assert pearson(predictions, labels) == pytest.approx(stats.pearsonr(predictions, labels).statistic)
    assert spearman(predictions, labels) == pytest.approx(stats.spearmanr(predictions, labels).statistic)


def test_build_metrics_takes_the_class_of_the_highest_logit():
    compute = build_metrics(["accuracy", "f1"], predicts="class")
    logits = np.array([[0.1, 2.0], [3.0, -1.0], [0.0, 0.5]])
    assert compute(EvalPrediction(logits, np.array([1, 0, 0]))) == {"accuracy": 2 / 3, "f1": 2 / 3}


def test_build_metrics_takes_the_first_of_several_outputs():
    compute = build_metrics(["accuracy"], predicts="class")
    outputs: Any = (np.array([[0.0, 1.0]]), np.zeros((1, 7, 3)))
    assert compute(EvalPrediction(outputs, np.array([1]))) == {"accuracy": 1.0}


def test_build_metrics_flattens_the_numbers_of_a_regression():
    compute = build_metrics(["pearson", "spearman"], predicts="number")
    result = compute(EvalPrediction(np.array([[1.0], [2.0], [3.0]]), np.array([2.0, 4.0, 6.0])))
    assert result == {"pearson": pytest.approx(1.0), "spearman": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("found", "wanted", "edits"),
    [
        ("a b c", "a b c", 0),
        ("", "a b c", 3),
        ("a b c", "", 3),
        ("a x c", "a b c", 1),
        ("b c d e", "a b c d", 2),
        ("a b", "b a", 2),
        ("K AE T S", "K AH T", 2),
    ],
)
def test_wer_counts_the_least_number_of_edits(found, wanted, edits):
    assert wer([found, "z"], [wanted, "z"]) == edits / (len(wanted.split()) + 1)


def test_build_metrics_decodes_generated_ids_and_their_filling():
    tokenizer: Any = ByT5Tokenizer()
    ids = [tokenizer("K AE T")["input_ids"], [*tokenizer("D AO")["input_ids"], -100, -100]]
    found = [[0, *ids[0]], [0, *tokenizer("D OW")["input_ids"], 0]]  # generation begins with the padding token
    compute = build_metrics(["wer", "exact_match"], "text", tokenizer)
    rows = [np.array([row + [-100] * (9 - len(row)) for row in side]) for side in (found, ids)]
    assert compute(EvalPrediction(*rows)) == {"wer": 1 / 5, "exact_match": 1 / 2}


@pytest.mark.parametrize(("name", "predicts"), [("accuracy", "number"), ("pearson", "class"), ("f1", "text")])
def test_build_metrics_refuses_a_metric_of_another_kind(name, predicts):
    with pytest.raises(RecipeError, match=f"metric '{name}' does not apply"):
        build_metrics([name], predicts)


def test_check_metrics_names_the_nearest_when_unknown():
    with pytest.raises(RecipeError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        check_metrics(["acuracy"])


def test_check_metrics_refuses_none():
    with pytest.raises(RecipeError, match="metric is empty"):
        check_metrics([])


@pytest.mark.parametrize("name", [*LOCAL, *ALIASES])
def test_check_metrics_leads_every_known_name_to_a_local_metric(name):
    assert set(check_metrics([name])) <= set(LOCAL)


def test_build_metrics_asks_evaluate_for_a_prefixed_name(monkeypatch):
    def load(*name):
        assert name == ("glue", "mrpc")
        return SimpleNamespace(
            compute=lambda predictions, references: {"same": float((predictions == references).sum())}
        )

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load))
    compute = build_metrics(check_metrics(["evaluate/glue/mrpc", "accuracy"]), predicts="class")
    output = EvalPrediction(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1]))
    assert compute(output) == {"same": 1.0, "accuracy": 0.5}


def test_build_metrics_says_what_works_without_when_evaluate_cannot_load(monkeypatch):
    def load(*name):
        raise FileNotFoundError("no network")

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load))
    with pytest.raises(RecipeError, match=r"(?s)no network.*Known without it: accuracy"):
        build_metrics(["evaluate/rouge"], predicts="class")


def test_metric_of_evaluate_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(RecipeError, match=r"'evaluate/bleu' needs the package evaluate, .*: pip install evaluate"):
        build_metrics(["evaluate/bleu"], "class")
