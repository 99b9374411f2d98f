"""The highest logits of each position, and all others together as one class: what a teacher says, in little space."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SparsityError
from .losses import mean_over


@dataclasses.dataclass(frozen=True)
class TopLogits:
    """Log-probabilities of the most likely classes of each position, and one for all others together.

    Args:
        values: of the most likely classes, at a temperature.
        index: which classes these are.
        rest: of all others together.

    Shapes: values and index `(..., k)`, rest `(...)`.
    """

    values: Tensor
    index: Tensor
    rest: Tensor

    def to(self, device: torch.device) -> TopLogits:
        """Return them on a device."""
        return TopLogits(self.values.to(device), self.index.to(device), self.rest.to(device))


def top_logits(logits: Tensor, count: int, temperature: float) -> TopLogits:
    """Return the most likely classes of each position.

    Args:
        logits: of all classes.
        count: k; at most one less than there are classes, as the last one is then all others.
        temperature: that logits are divided by.

    Example:
        >>> top = top_logits(torch.tensor([[0.0, 2.0, 1.0, 0.0]]), 2, 1.0)
        >>> top.index.tolist(), round((top.values.exp().sum() + top.rest.exp()).item(), 5)
        ([[1, 2]], 1.0)
    """
    logs = F.log_softmax(logits.float() / temperature, dim=-1)
    values, index = logs.topk(min(count, logs.shape[-1] - 1), dim=-1)
    return TopLogits(values, index, _rest(logs, index))


def top_logits_kl(
    student: Tensor,
    teacher: TopLogits,
    temperature: float,
    valid: Tensor | None = None,
    count: Tensor | int | None = None,
) -> Tensor:
    """Return `T^2 KL(t || s)` over the teacher's most likely classes and one class of all others.

    Merging classes can only bring distributions nearer to each other: the loss is never above `soft_target_kl`, and
    equal to it where at most one class is merged.

    Args:
        student: logits of all classes.
        teacher: made with the same temperature.
        temperature: T, above 0.
        valid: which positions count; None = all.
        count: what the sum is divided by; None = the number of valid positions.

    Raises:
        SparsityError: if teacher and student do not have the same positions, or the student lacks a class.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0, 0.0]])
        >>> round(float(top_logits_kl(logits, top_logits(logits, 2, 1.0), 1.0)), 6)
        0.0
    """
    index = teacher.index.long()
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    if student.shape[:-1] != teacher.rest.shape or low < 0 or high >= student.shape[-1]:
        raise SparsityError(
            f"the student's logits have shape {tuple(student.shape)}, and the teacher's are of classes {low} to {high} "
            f"at {tuple(teacher.rest.shape)} positions, so they cannot be compared: teacher and student need the same "
            "vocabulary and tokenizer"
        )
    scaled = student.float() / temperature
    ours = torch.cat([scaled.gather(-1, index), _rest(scaled, index)[..., None]], dim=-1)
    theirs = torch.cat([teacher.values.float(), teacher.rest.float()[..., None]], dim=-1)
    # Both sum to 1 over these classes; the teacher's does so no more after rounding to 16 bits.
    log_s, log_t = F.log_softmax(ours, dim=-1), F.log_softmax(theirs, dim=-1)
    return temperature**2 * mean_over((log_t.exp() * (log_t - log_s)).sum(-1), valid, count)


def _rest(logits: Tensor, index: Tensor) -> Tensor:
    return logits.scatter(-1, index, float("-inf")).logsumexp(-1)
