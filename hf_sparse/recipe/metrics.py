"""Metrics of a recipe. The usual ones are computed here: no download, and no code from elsewhere.

Any other is written `evaluate/NAME` and loaded by the `evaluate` package, which fetches that metric's program from the
Hub and runs it: name only metrics you trust. `evaluate/accuracy` is the same number as `accuracy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..errors import RecipeError
from ..registry import nearest

Predicts = Literal["class", "number", "text", "token"]
"""What comes out of the model."""

Array = np.ndarray[Any, Any]


def accuracy(predictions: Array, references: Array) -> float:
    """Return the fraction of predictions that are right.

    Example:
        >>> accuracy(np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1]))
        0.75
    """
    return float(np.mean(predictions == references))


def f1(predictions: Array, references: Array) -> float:
    """Return the F1 score `2 TP / (2 TP + FP + FN)` of class 1; with more than two classes the mean over all of them.

    Example:
        >>> f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]))
        0.5
    """
    classes = np.union1d(predictions, references)
    if classes.size == 0 or classes.max() <= 1:
        return _f1_of(1, predictions, references)
    return float(np.mean([_f1_of(label, predictions, references) for label in classes]))


def _f1_of(label: int, predictions: Array, references: Array) -> float:
    hits = np.sum((predictions == label) & (references == label))
    both = np.sum(predictions == label) + np.sum(references == label)
    return float(2 * hits / both) if both else 0.0


def matthews(predictions: Array, references: Array) -> float:
    """Return Matthews' correlation of two sets of classes; 0 if either has one class only.

    Example:
        >>> round(matthews(np.array([1, 1, 0, 0]), np.array([1, 1, 1, 0])), 4)
        0.5774

    Source: Gorodkin 2004, the K-category correlation coefficient.
    """
    classes = np.union1d(predictions, references)
    guessed = predictions[:, None] == classes
    true = references[:, None] == classes
    return _correlation(guessed.astype(float), true.astype(float))


def pearson(predictions: Array, references: Array) -> float:
    """Return the linear correlation; 0 if either side is constant.

    Example:
        >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])), 4)
        0.982
    """
    return _correlation(np.asarray(predictions, float), np.asarray(references, float))


def spearman(predictions: Array, references: Array) -> float:
    """Return the linear correlation of the ranks, equal values sharing their mean rank; 0 if either side is constant.

    Example:
        >>> spearman(np.array([1.0, 2.0, 30.0]), np.array([5.0, 6.0, 7.0]))
        1.0
    """
    return _correlation(_ranks(predictions), _ranks(references))


def _correlation(a: Array, b: Array) -> float:
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.clip(np.sum(a * b) / scale, -1.0, 1.0)) if scale > 0 else 0.0


def _ranks(values: Array) -> Array:
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(size)
    return (last - (size - 1) / 2)[group]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the fraction of predictions equal to their reference, without spaces at the ends.

    Example:
        >>> exact_match(["a b ", "a"], ["a b", "A"])
        0.5
    """
    same = sum(one.strip() == other.strip() for one, other in zip(predictions, references, strict=True))
    return same / len(references)


def wer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the word error rate: words to insert, delete or replace, over all words of the references.

    Words are separated by spaces; where they are phonemes, it is the phoneme error rate. It can be above 1.

    Example:
        >>> wer(["a x c", "d"], ["a b c", "d e"])
        0.4

    Source: Levenshtein 1966; as `jiwer` and `evaluate`'s "wer" compute it, over the whole corpus.
    """
    pairs = [(one.split(), other.split()) for one, other in zip(predictions, references, strict=True)]
    words = sum(len(reference) for _, reference in pairs)
    return sum(_edit_distance(predicted, reference) for predicted, reference in pairs) / max(1, words)


def _edit_distance(predicted: Sequence[str], reference: Sequence[str]) -> int:
    """Return the smallest number of insertions, deletions and replacements between two sequences."""
    row = list(range(len(reference) + 1))
    for i, word in enumerate(predicted, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(reference, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def perplexity(predictions: Array, references: Array) -> float:
    """Return `exp` of the mean negative log-likelihood of the tokens.

    Args:
        predictions: log-likelihoods of the right tokens, or means of them over as many tokens each.
        references: not looked at.

    Example:
        >>> round(perplexity(np.log([0.25, 0.25]), np.array([])), 6)
        4.0
    """
    return float(np.exp(-np.mean(predictions)))


LOCAL: Mapping[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "exact_match": exact_match,
    "wer": wer,
    "perplexity": perplexity,
}
KINDS: Mapping[str, Predicts] = {
    "pearson": "number",
    "spearman": "number",
    "exact_match": "text",
    "wer": "text",
    "perplexity": "token",
}
"""What the metrics apply to; the others apply to classes."""
DEFAULT: Mapping[Predicts, str] = {
    "class": "accuracy",
    "number": "pearson",
    "text": "exact_match",
    "token": "perplexity",
}
ALIASES: Mapping[str, tuple[str, ...]] = {
    "matthews": ("matthews_correlation",),
    "pearsonr": ("pearson",),
    "spearmanr": ("spearman",),
    "glue/cola": ("matthews_correlation",),
    "glue/mrpc": ("accuracy", "f1"),
    "glue/qqp": ("accuracy", "f1"),
    "glue/stsb": ("pearson", "spearman"),
    **{f"glue/{task}": ("accuracy",) for task in ("sst2", "mnli", "qnli", "rte", "wnli")},
}
EVALUATE = "evaluate/"


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names with aliases replaced and repeated ones dropped.

    Raises:
        RecipeError: for no name at all, or one that is neither known here nor begins with `evaluate/`.

    Example:
        >>> check_metrics(["glue/mrpc", "accuracy", "evaluate/brier_score"])
        ('accuracy', 'f1', 'evaluate/brier_score')
    """
    if not names:
        raise RecipeError(f"metric is empty; name one of {', '.join(LOCAL)}")
    found: dict[str, None] = {}
    for name in names:
        if name not in LOCAL and name not in ALIASES and not name.startswith(EVALUATE):
            raise RecipeError(
                f"unknown metric '{name}'{nearest(name, [*LOCAL, *ALIASES])} Known: {', '.join([*LOCAL, *ALIASES])}; "
                f"and '{EVALUATE}{name}' would ask the evaluate package, which downloads and runs the metric's program."
            )
        found.update(dict.fromkeys(ALIASES.get(name, (name,))))
    return tuple(found)


def build_metrics(
    names: Sequence[str], predicts: Predicts, tokenizer: PreTrainedTokenizerBase | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the `compute_metrics` of a Trainer.

    Args:
        names: as `check_metrics` returns them.
        predicts: of classes, the one with the highest logit is the prediction; of generated text, the token ids are.
        tokenizer: which decodes token ids; for generated text only.

    Raises:
        RecipeError: for a metric of another kind of prediction, or one that `evaluate` cannot load.
    """
    for name in names:
        if name in LOCAL and KINDS.get(name, "class") != predicts:
            kind = {"class": "a class", "number": "one number", "text": "a text", "token": "the next token"}[predicts]
            fitting = [other for other in LOCAL if KINDS.get(other, "class") == predicts]
            raise RecipeError(f"the model predicts {kind}, so metric '{name}' does not apply; use {_or(fitting)}")
    loaded = {name: LOCAL[name] if name in LOCAL else _from_evaluate(name) for name in names}

    def examples(ids: Array) -> list[str]:
        assert tokenizer is not None
        padded = np.where(ids < 0, tokenizer.pad_token_id, ids)  # the Trainer fills up with -100
        return list(tokenizer.batch_decode(padded, skip_special_tokens=True))

    def compute(output: EvalPrediction) -> dict[str, float]:
        references: Any = output.label_ids
        predictions: Any = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        if predicts == "text":
            predictions, references = examples(predictions), examples(references)
        else:
            predictions = predictions.reshape(-1) if predicts == "number" else predictions.argmax(axis=-1)
        results: dict[str, float] = {}
        for name, metric in loaded.items():
            value: Any = metric(predictions, references)
            results.update(value if isinstance(value, dict) else {name: value})
        return results

    return compute


def _from_evaluate(name: str) -> Callable[[Any, Any], dict[str, float]]:
    try:
        import evaluate  # here, not above: an extra, and needed for these metrics only
    except ImportError as error:
        raise RecipeError(
            f"metric '{name}' needs the package evaluate, which is not installed: pip install evaluate. Known without "
            f"it: {', '.join(LOCAL)}"
        ) from error
    try:
        metric = evaluate.load(*name.removeprefix(EVALUATE).split("/", 1))
    except (OSError, ImportError, ValueError) as error:
        raise RecipeError(
            f"metric '{name}' cannot be loaded by the evaluate package: {error}\nKnown without it: {', '.join(LOCAL)}."
        ) from error
    return lambda predictions, references: dict(metric.compute(predictions=predictions, references=references))


def _or(words: Any) -> str:
    return " or ".join(sorted(words))
