"""What pruning changed for a classifier besides its accuracy: classes, predictions, calibration, robustness."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RecipeError, SparsityError
from ..hf.auto import check_length, load_tokenizer
from ..recipe.data import load_split
from ..recipe.data_loader import label_number
from ..recipe.sections import DataSection

BATCH = 32
BINS = 15
TYPO_SEED = 0

Texts = Sequence[tuple[str, ...]]


def ece(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean over examples of |accuracy - confidence| of their bin.

    Bins are equal parts `(low, high]` of the confidence, which is the highest probability.

    Shapes: probabilities `(examples, classes)`, labels `(examples,)`.

    Example:
        >>> ece(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]), bins=10)  # |0.5 - 0.9|
        0.4

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    confidence, predicted = probabilities.double().max(1)
    # Confidences are rounded to 32 bits: one on the edge of a bin must not move to the next.
    index = (confidence * bins - 1e-6).ceil().clamp(1, bins).long() - 1
    correct = predicted.eq(labels).double()
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct - confidence)
    return round(float(gaps.abs().sum() / len(labels)), 7)


def with_typos(text: str, share: float, seed: int = TYPO_SEED) -> str:
    """Return a text where two adjacent inner letters are swapped in about this share of its longer words.

    Words of four characters or more can get one; the first and last character stay.

    Example:
        >>> with_typos("abcd is", 1.0)
        'acbd is'
    """
    chance = random.Random(f"{seed} {text}")  # noqa: S311 - not a secret, and the same for both models
    words = text.split(" ")
    for index, word in enumerate(words):
        if len(word) >= 4 and chance.random() < share:
            cut = chance.randrange(1, len(word) - 2)
            words[index] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def truncated(text: str, share: float) -> str:
    """Return the first words of a text, at least one.

    Example:
        >>> truncated("a b c d", 0.5)
        'a b'
    """
    words = text.split(" ")
    return " ".join(words[: max(1, round(len(words) * share))])


CORRUPTIONS: dict[str, Callable[[str], str]] = {
    "clean": lambda text: text,
    "typos in 25% of longer words": lambda text: with_typos(text, 0.25),
    "typos in all longer words": lambda text: with_typos(text, 1.0),
    "first half of the words": lambda text: truncated(text, 0.5),
    "first quarter of the words": lambda text: truncated(text, 0.25),
}
"""Input corruptions by name; the first leaves the text as it is."""


@dataclasses.dataclass(frozen=True)
class Robustness:
    """The predictions of a dense and a sparse classifier on the same examples.

    Args:
        names: of the classes.
        texts: the uncorrupted inputs.  words: ok
        labels: the correct classes.
        dense, sparse: probabilities of the classes.
        corrupted: accuracy of the dense and of the sparse model by the name of the corruption.

    Shapes: labels `(examples,)`, dense and sparse `(examples, classes)`.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    labels: Tensor
    dense: Tensor
    sparse: Tensor
    corrupted: dict[str, tuple[float, float]]

    def classes(self) -> list[tuple[str, int, tuple[float, float], tuple[float, float], tuple[float, float]]]:
        """Return of each class its name, number of examples, and precision, recall and F1, each dense and sparse."""
        rows = []
        for number, name in enumerate(self.names):
            pairs = [_scores(outputs.argmax(1), self.labels, number) for outputs in (self.dense, self.sparse)]
            precision, recall, f1 = zip(*pairs, strict=True)
            rows.append((name, int(self.labels.eq(number).sum()), precision, recall, f1))
        return rows

    def changed(self) -> list[int]:
        """Return the indices of the examples whose predicted class changed, those that became wrong first."""
        before, after = self.dense.argmax(1), self.sparse.argmax(1)
        indices = before.ne(after).nonzero().flatten().tolist()
        return sorted(indices, key=lambda index: (before[index] != self.labels[index], index))

    def counts(self) -> dict[str, int]:
        """Return how many predictions became wrong, became correct, and changed from one wrong class to another."""
        before, after = self.dense.argmax(1), self.sparse.argmax(1)
        was_correct, is_correct = before.eq(self.labels), after.eq(self.labels)
        return {
            "became wrong": int((was_correct & ~is_correct).sum()),
            "became correct": int((~was_correct & is_correct).sum()),
            "changed to another wrong class": int((~was_correct & ~is_correct & before.ne(after)).sum()),
        }

    def calibration(self) -> dict[str, tuple[float, float]]:
        """Return expected calibration error and mean confidence, each dense and sparse."""
        both = (self.dense, self.sparse)
        errors, confidence = (
            (ece(outputs, self.labels) for outputs in both),
            (float(outputs.max(1).values.mean()) for outputs in both),
        )
        return {"expected calibration error": _pair(errors), "mean confidence": _pair(confidence)}

    def describe(self, index: int) -> tuple[str, str, str]:
        """Return the label of an example and the predictions of the dense and the sparse model, with probabilities."""
        predictions = []
        for outputs in (self.dense, self.sparse):
            number = int(outputs[index].argmax())
            predictions.append(f"{self.names[number]} ({float(outputs[index, number]):.0%})")
        return self.names[int(self.labels[index])], predictions[0], predictions[1]


def _pair(values: Any) -> tuple[float, float]:
    dense, sparse = values
    return dense, sparse


def _scores(predicted: Tensor, labels: Tensor, number: int) -> tuple[float, float, float]:
    hits = float((predicted.eq(number) & labels.eq(number)).sum())
    positive, true = float(predicted.eq(number).sum()), float(labels.eq(number).sum())
    precision, recall = (hits / positive if positive else 0.0), (hits / true if true else 0.0)
    return precision, recall, 2 * hits / (positive + true) if positive + true else 0.0


def measure_robustness(
    name: str, sparse: PreTrainedModel, against: str, dense: Any, section: DataSection
) -> Robustness:
    """Evaluate both models on the examples of a file, clean and corrupted.

    Args:
        name, against: folders or Hub names, for the tokenizers.
        section: whose training examples are read.

    Raises:
        RecipeError: if the models are not classifiers of the same classes, or a label is not one of theirs.
    """
    names = _class_names(sparse, name)
    if _class_names(dense, against) != names:
        raise RecipeError(f"{name} and {against} have different classes: {names} and {_class_names(dense, against)}")
    rows = load_split(section, "train")
    texts: Texts = list(zip(*(rows[column] for column in section.text_columns), strict=True))
    labels = torch.tensor([int(label_number(sparse, value, index)) for index, value in enumerate(rows["labels"])])
    models = [(dense, load_tokenizer(against)), (sparse, load_tokenizer(name))]
    for model, tokenizer in models:
        check_length(section.max_length, model, tokenizer)
    accuracies: dict[str, tuple[float, float]] = {}
    clean: list[Tensor] = []
    for corruption, corrupt in CORRUPTIONS.items():
        inputs = [tuple(corrupt(part) for part in text) for text in texts]
        outputs = [predict(model, tokenizer, inputs, section.max_length) for model, tokenizer in models]
        clean = clean or outputs
        accuracies[corruption] = _pair(float(each.argmax(1).eq(labels).double().mean()) for each in outputs)
    return Robustness(names, tuple(" | ".join(text) for text in texts), labels, clean[0], clean[1], accuracies)


def _class_names(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    if model.config.is_encoder_decoder or not type(model).__name__.endswith("ForSequenceClassification"):
        raise RecipeError(
            f"predictions are compared for sequence classifiers, and {name} is a {type(model).__name__}; omit --data"
        )
    known: dict[Any, Any] = dict(model.config.id2label or {})
    if len(known) < 2:
        raise RecipeError(f"{name} is a regression model, and predictions are compared for classifiers; omit --data")
    return tuple(str(known[number]) for number in sorted(known))


@torch.no_grad()
def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, length: int) -> Tensor:
    """Return the probabilities of the classes, without dropout; the training mode of the model is restored.

    Shapes: `(examples, classes)`.
    """
    training, batches = model.training, []
    model.eval()
    try:
        for start in range(0, len(texts), BATCH):
            columns = [list(column) for column in zip(*texts[start : start + BATCH], strict=True)]
            tokens = tokenizer(*columns, truncation=True, max_length=length, padding=True, return_tensors="pt")
            batches.append(model(**tokens.to(model.device)).logits.float().softmax(-1).cpu())
    finally:
        model.train(training)
    probabilities = torch.cat(batches)
    if not probabilities.isfinite().all():
        raise SparsityError(
            f"{model.name_or_path} outputs probabilities that are not finite; check its weights for NaN"
        )
    return probabilities
