"""What pruning changed for a classifier beside its accuracy: classes, single answers, confidence, damaged input."""

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
from ..reporting import html as page

BATCH = 32
SHOWN = 30
BINS = 15
TYPO_SEED = 0

Texts = Sequence[tuple[str, ...]]


def ece(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean over texts of |accuracy - confidence| of their bin.

    Bins are equal parts `(low, high]` of the confidence, which is the highest probability.

    Shapes: probabilities `(texts, classes)`, labels `(texts,)`.

    Example:
        >>> ece(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]), bins=10)  # |0.5 - 0.9|
        0.4

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    confidence, predicted = probabilities.double().max(1)
    # Confidences come as 32-bit floats: what is meant to lie on an edge must not fall over it.
    place = (confidence * bins - 1e-6).ceil().clamp(1, bins).long() - 1
    right = predicted.eq(labels).double()
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return round(float(gaps.abs().sum() / len(labels)), 7)


def with_typos(text: str, share: float, seed: int = TYPO_SEED) -> str:
    """Return a text where two neighbouring inner letters are swapped in about this share of its longer words.

    Words of four signs or more can get one; first and last sign stay, as people's typos mostly leave them.

    Example:
        >>> with_typos("abcd is", 1.0)
        'acbd is'
    """
    chance = random.Random(f"{seed} {text}")  # noqa: S311  no secret, and the same for both models
    words = text.split(" ")
    for place, word in enumerate(words):
        if len(word) >= 4 and chance.random() < share:
            cut = chance.randrange(1, len(word) - 2)
            words[place] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def shortened(text: str, share: float) -> str:
    """Return the first words of a text, at least one.

    Example:
        >>> shortened("a b c d", 0.5)
        'a b'
    """
    words = text.split(" ")
    return " ".join(words[: max(1, round(len(words) * share))])


DAMAGE: dict[str, Callable[[str], str]] = {
    "as they are": lambda text: text,
    "typos in 25% of longer words": lambda text: with_typos(text, 0.25),
    "typos in all longer words": lambda text: with_typos(text, 1.0),
    "first half of the words": lambda text: shortened(text, 0.5),
    "first quarter of the words": lambda text: shortened(text, 0.25),
}
"""What is done to the texts, by name; the first is nothing."""


@dataclasses.dataclass(frozen=True)
class Stress:
    """The answers of two models to the same texts.

    Args:
        names: of the classes.
        texts: as they are in the data.
        labels: the right classes.
        dense, sparse: probabilities of the classes.
        damaged: accuracy of the dense and of the sparse model by what was done to the texts.

    Shapes: labels `(texts,)`, dense and sparse `(texts, classes)`.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    labels: Tensor
    dense: Tensor
    sparse: Tensor
    damaged: dict[str, tuple[float, float]]

    def classes(self) -> list[tuple[str, int, tuple[float, float], tuple[float, float], tuple[float, float]]]:
        """Return for each class its name, its texts, and precision, recall and F1, each dense and sparse."""
        rows = []
        for number, name in enumerate(self.names):
            pairs = [_scores(answers.argmax(1), self.labels, number) for answers in (self.dense, self.sparse)]
            precision, recall, f1 = zip(*pairs, strict=True)
            rows.append((name, int(self.labels.eq(number).sum()), precision, recall, f1))
        return rows

    def flips(self) -> list[int]:
        """Return the numbers of texts that the two models answer differently, those that became wrong first."""
        before, after = self.dense.argmax(1), self.sparse.argmax(1)
        changed = before.ne(after).nonzero().flatten().tolist()
        return sorted(changed, key=lambda place: (before[place] != self.labels[place], place))

    def counts(self) -> dict[str, int]:
        """Return how many texts became wrong, became right, and changed from one wrong class to another."""
        before, after = self.dense.argmax(1), self.sparse.argmax(1)
        good, fine = before.eq(self.labels), after.eq(self.labels)
        return {
            "became wrong": int((good & ~fine).sum()),
            "became right": int((~good & fine).sum()),
            "another wrong class": int((~good & ~fine & before.ne(after)).sum()),
        }

    def sections(self) -> list[str]:
        """Return the sections of the report."""
        head = ["class", "texts", "precision", "recall", "F1"]
        rows: list[list[object]] = [
            [name, count, *("{} → {} ({})".format(*_change(*pair)) for pair in figures)]
            for name, count, *figures in self.classes()
        ]
        parts = [page.section("What pruning changed: classes", page.table(head, rows), "Dense → sparse (change).")]
        counts, flips = self.counts(), self.flips()
        note = f"Of {len(self.labels)} texts, " + ", ".join(f"{count} {what}" for what, count in counts.items()) + "."
        title = "What pruning changed: single answers"
        if flips:
            listed = [
                [self.texts[i], *(self._answer(values, i) for values in (self.labels, self.dense, self.sparse))]
                for i in flips[:SHOWN]
            ]
            note += f" The first {SHOWN} of {len(flips)} are shown." if len(flips) > SHOWN else ""
            parts.append(page.section(title, page.table(["text", "right", "dense", "sparse"], listed), note))
        else:
            parts.append(page.left_out(title, f"both models give the same class to all {len(self.labels)} texts"))
        errors = [ece(answers, self.labels) for answers in (self.dense, self.sparse)]
        sure = [float(answers.max(1).values.mean()) for answers in (self.dense, self.sparse)]
        rows = [["expected calibration error", *_change(*errors)], ["mean confidence", *_change(*sure)]]
        body = page.table(["measure", *STAGES], rows)
        note = f"How far confidence is from accuracy, in {BINS} bins (Guo et al. 2017): 0 is best."
        parts.append(page.section("What pruning changed: calibration", body, note))
        body = page.table(["texts", *STAGES], [[what, *_change(*pair)] for what, pair in self.damaged.items()])
        note = "Accuracy on damaged texts, the same damage for both models (seeded swaps of neighbouring letters)."
        return [*parts, page.section("What pruning changed: robustness", body, note)]

    def _answer(self, values: Tensor, place: int) -> str:
        if values.ndim == 1:
            return self.names[int(values[place])]
        number = int(values[place].argmax())
        return f"{self.names[number]} ({float(values[place, number]):.0%})"


STAGES = ("dense", "sparse", "change")


def _change(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"


def _scores(predicted: Tensor, labels: Tensor, number: int) -> tuple[float, float, float]:
    hits = float((predicted.eq(number) & labels.eq(number)).sum())
    said, true = float(predicted.eq(number).sum()), float(labels.eq(number).sum())
    return hits / said if said else 0.0, hits / true if true else 0.0, 2 * hits / (said + true) if said + true else 0.0


def stress(name: str, sparse: PreTrainedModel, against: str, dense: Any, section: DataSection) -> Stress:
    """Ask both models about the texts of a file, as they are and damaged.

    Args:
        name, against: folders or Hub names, for the tokenizers.
        section: whose training texts are read.

    Raises:
        RecipeError: if the models are no classifiers of the same classes, or a label is none of theirs.
    """
    names = _class_names(sparse, name)
    if _class_names(dense, against) != names:
        raise RecipeError(f"{name} and {against} have other classes: {names} and {_class_names(dense, against)}")
    rows = load_split(section, "train")
    texts: Texts = list(zip(*(rows[column] for column in section.text_columns), strict=True))
    labels = torch.tensor([int(label_number(sparse, value, place)) for place, value in enumerate(rows["labels"])])
    models = [(dense, load_tokenizer(against)), (sparse, load_tokenizer(name))]
    for model, tokenizer in models:
        check_length(section.max_length, model, tokenizer)
    damaged: dict[str, tuple[float, float]] = {}
    clean: list[Tensor] = []
    for what, damage in DAMAGE.items():
        changed = [tuple(damage(part) for part in text) for text in texts]
        answers = [predict(model, tokenizer, changed, section.max_length) for model, tokenizer in models]
        clean = clean or answers
        before, after = (float(found.argmax(1).eq(labels).double().mean()) for found in answers)
        damaged[what] = (before, after)
    return Stress(names, tuple(" | ".join(text) for text in texts), labels, clean[0], clean[1], damaged)


def _class_names(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    if model.config.is_encoder_decoder or not type(model).__name__.endswith("ForSequenceClassification"):
        raise RecipeError(
            f"what pruning changed is shown for classifiers of texts, and {name} is none; leave out --data"
        )
    known: dict[Any, Any] = dict(model.config.id2label or {})
    if len(known) < 2:
        raise RecipeError(f"{name} gives numbers, not classes; leave out --data")
    return tuple(str(known[number]) for number in sorted(known))


@torch.no_grad()
def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, length: int) -> Tensor:
    """Return the probabilities of the classes, without dropout; the model is left as it was.

    Shapes: `(texts, classes)`.
    """
    training, found = model.training, []
    model.eval()
    try:
        for start in range(0, len(texts), BATCH):
            columns = [list(column) for column in zip(*texts[start : start + BATCH], strict=True)]
            tokens = tokenizer(*columns, truncation=True, max_length=length, padding=True, return_tensors="pt")
            found.append(model(**tokens.to(model.device)).logits.float().softmax(-1).cpu())
    finally:
        model.train(training)
    answers = torch.cat(found)
    if not answers.isfinite().all():
        raise SparsityError(
            f"{model.name_or_path} gives probabilities that are not finite; are there NaN in its weights?"
        )
    return answers
