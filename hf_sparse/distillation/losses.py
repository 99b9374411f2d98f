"""Distillation losses: soft targets, hidden states, attention maps, embeddings. Plain functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SparsityError


def soft_target_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    valid: Tensor | None = None,
    classes: Tensor | None = None,
    count: Tensor | int | None = None,
) -> Tensor:
    """Return `T^2 KL(softmax(t / T) || softmax(s / T))`, averaged over the valid positions.

    The factor keeps the gradient of the same size whatever the temperature is.

    Args:
        student, teacher: logits.
        temperature: T, above 0; a higher one gives unlikely classes more weight.
        valid: which positions count; None = all. Padding never does, so a longer batch has the same loss.
        classes: which classes exist, for logits over positions of a padded sequence; None = all.
        count: what the sum is divided by; None = the number of valid positions.

    Shapes: logits `(..., classes)`, valid `(...)`, classes `(..., classes)`; returns a scalar.

    Raises:
        SparsityError: if teacher and student have logits of different shapes.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0], [0.0, 9.0]])
        >>> float(soft_target_kl(logits, logits, temperature=2.0))
        0.0

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    _same_shape(student, teacher, "logits")
    s, t = student.float() / temperature, teacher.float() / temperature
    if classes is not None:
        s, t = (logits.masked_fill(~classes, float("-inf")) for logits in (s, t))
    log_s, log_t = F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1)
    terms = log_t.exp() * (log_t - log_s)
    if classes is not None:
        terms = torch.where(classes, terms, 0.0)  # 0 * (inf - inf) of classes that do not exist
    return temperature**2 * mean_over(terms.sum(-1), valid, count)


def sigmoid_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    valid: Tensor | None = None,
    count: Tensor | int | None = None,
) -> Tensor:
    """Return `T^2 KL(sigmoid(t / T) || sigmoid(s / T))` of independent classes, averaged over positions and classes.

    For multi-label classification: each class is a yes or no of its own. It differs from the binary cross-entropy with
    the teacher's probabilities as targets by a constant, so that it is 0 for equal logits.

    Args:
        student, teacher: logits.
        temperature: T, above 0.
        valid: which positions count; None = all.
        count: what the sum over positions is divided by; None = the number of valid positions.

    Shapes: logits `(..., classes)`, valid `(...)`; returns a scalar.

    Raises:
        SparsityError: if teacher and student have logits of different shapes.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0], [0.0, 9.0]])
        >>> float(sigmoid_kl(logits, logits, temperature=2.0))
        0.0

    Source: Hinton et al. 2015, section 2, with one Bernoulli distribution for each class.
    """
    _same_shape(student, teacher, "logits")
    s, t = student.float() / temperature, teacher.float() / temperature
    p = t.sigmoid()
    terms = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * mean_over(terms.mean(-1), valid, count)


def masked_mse(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, count: Tensor | int | None = None
) -> Tensor:
    """Return the squared difference, averaged over the valid positions and all features.

    Args:
        student, teacher: hidden states, or anything with positions in front and features behind.
        valid: which positions count; None = all.
        count: what the sum over positions is divided by; None = the number of valid positions.

    Shapes: `(batch, length, ...)`, valid `(batch, length)`; returns a scalar.

    Raises:
        SparsityError: if teacher and student have different shapes.

    Example:
        >>> states = torch.zeros(1, 2, 3)
        >>> valid = torch.tensor([[True, False]])
        >>> float(masked_mse(states, torch.tensor([[[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]]]), valid))
        1.0
    """
    _same_shape(student, teacher, "states")
    squares = (student.float() - teacher.float()).square()
    if valid is None:
        return mean_over(squares, None, None)
    return mean_over(squares.flatten(valid.ndim).mean(-1), valid, count)


def attention_mse(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the squared difference of attention maps, averaged over heads and the valid queries and keys.

    Attention to padding is zero in both, so as a key it would only make the mean smaller the longer the batch is.

    Args:
        student, teacher: attention of each query to each key.
        valid: which positions of the sequence count, as queries and as keys; None = all.

    Shapes: `(batch, heads, length, length)`, valid `(batch, length)`; returns a scalar.

    Raises:
        SparsityError: if teacher and student have different shapes.

    Example:
        >>> one = torch.tensor([[[[1.0, 0.0, 0.0]] * 3]])
        >>> other = torch.tensor([[[[0.0, 1.0, 0.0]] * 3]])
        >>> float(attention_mse(one, other, torch.tensor([[True, True, False]])))
        1.0
    """
    _same_shape(student, teacher, "attention maps")
    squares = (student.float() - teacher.float()).square().mean(1)  # (batch, queries, keys)
    if valid is None:
        return squares.mean()
    if valid.shape[1] != squares.shape[2]:  # keys that are not positions of the sequence, as of a prefix: all count
        return mean_over(squares.mean(-1), valid, None)
    keys = valid.sum(-1, keepdim=True).clamp(min=1)
    return mean_over(torch.where(valid[:, None], squares, 0.0).sum(-1) / keys, valid, None)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `1 - cos(s, t)`, averaged over the embeddings; of lengths it says nothing.

    Args:
        student, teacher: embeddings of the same sentences.

    Shapes: `(batch, size)`; returns a scalar.

    Raises:
        SparsityError: if teacher and student have different shapes.

    Example:
        >>> float(cosine_distance(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])))
        0.5
    """
    _same_shape(student, teacher, "embeddings")
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def similarity_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference of the cosine similarities of all pairs in a batch, averaged over the pairs.

    Student and teacher may have embeddings of different sizes: only who is near whom is compared. Each embedding with
    itself does not count.

    Args:
        student, teacher: embeddings of the same sentences, at least two.

    Shapes: `(batch, size)`; returns a scalar, 0 for a single sentence.

    Raises:
        SparsityError: if teacher and student have embedded different numbers of sentences.

    Example:
        >>> near, far = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> float(similarity_mse(near, far))
        1.0

    Source: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", equation 4, with cosines.
    """
    if len(student) != len(teacher):
        raise SparsityError(f"the teacher has embedded {len(teacher)} sentences and the student {len(student)}")
    s, t = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    squares = (s @ s.T - t @ t.T).square()
    pairs = len(s) * (len(s) - 1)
    return (squares.sum() - squares.diagonal().sum()) / max(pairs, 1)


def mean_over(values: Tensor, valid: Tensor | None, count: Tensor | int | None) -> Tensor:
    """Return the sum of the values at valid positions, divided by a count (None = by their number)."""
    if valid is not None:
        values = torch.where(valid, values, 0.0)
        count = valid.sum().clamp(min=1) if count is None else count
    return values.sum() / (values.numel() if count is None else count)


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise SparsityError(
            f"the teacher's {what} have shape {tuple(teacher.shape)} and the student's {tuple(student.shape)}, so they "
            "cannot be compared: teacher and student need the same classes (or vocabulary), tokenizer and hidden size"
        )
