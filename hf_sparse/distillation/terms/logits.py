"""Logits of teacher and student: classes, spans, next tokens, numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config.distillation import TERMS
from ...errors import SparsityError
from ..losses import masked_mse, sigmoid_kl, soft_target_kl
from ..top_logits import TopLogits, top_logits_kl
from .base import NEVER, Comparison, Term

_NAMES = ("logits", "start_logits", "end_logits")


@TERMS.register("logits")
@dataclasses.dataclass
class Logits(Term):
    """Soft targets (`losses.soft_target_kl`), and for regressions the squared difference.

    Of a teacher that was cached with its most likely tokens alone, soft targets over these (`top_logits_kl`).
    """

    cached: ClassVar[bool] = True

    @property
    def log_name(self) -> str:
        return "distillation_kl"

    def value(self, pair: Comparison) -> Tensor:
        names = [name for name in _NAMES if pair.student.get(name) is not None]
        if not names:
            raise SparsityError(
                f"the model returns no logits to distil, but {', '.join(pair.student)}. TRL's SFTTrainer, for one, "
                "never has them all at once: use the Trainer of transformers, set logits_weight=0 and give "
                "hidden_weight, or leave the teacher out"
            )
        return torch.stack([_one(pair, name) for name in names]).mean()


def _one(pair: Comparison, name: str) -> Tensor:
    s, t, batch, temperature = pair.student[name], pair.teacher[name], pair.batch, pair.config.temperature
    if name != "logits":  # logits over the positions of a sequence, without padding
        kept = batch.get("attention_mask")
        classes = None if kept is None or kept.shape != s.shape else kept.bool()
        return pair.share * soft_target_kl(s, t, temperature, classes=classes)
    labels, count = batch.get("labels"), batch.get("num_items_in_batch")
    if s.shape[-1] == 1 or pair.problem_type() == "regression":  # numbers have no distribution
        return pair.share * masked_mse(s, t)
    if _is_multi_label(pair.problem_type(), s, labels):
        return pair.share * sigmoid_kl(s, t, temperature)
    valid = _trained(s, batch, pair.shifts_labels)
    # The Trainer counts the labels of all accumulated batches, so that long batches weigh more than short ones.
    counted = labels is not None and count is not None
    share, count = (1.0, count) if counted else (pair.share, None)
    if isinstance(t, TopLogits):
        return share * top_logits_kl(s, t, temperature, valid, count=count)
    return share * soft_target_kl(s, t, temperature, valid, count=count)


def _is_multi_label(declared: str | None, logits: Tensor, labels: Tensor | None) -> bool:
    """Return whether each class is a yes or no of its own: float labels of the shape of the logits, as usual."""
    if declared is not None:
        return declared == "multi_label_classification"
    return labels is not None and labels.is_floating_point() and labels.shape == logits.shape


def _trained(logits: Tensor, batch: Mapping[str, Any], shifts: bool) -> Tensor | None:
    """Return which positions have a label; padded targets of a sequence have none."""
    labels = batch.get("labels")
    if logits.ndim < 3:
        return None if labels is None or labels.shape != logits.shape[:-1] else labels != NEVER
    if labels is None or labels.shape != logits.shape[:-1]:
        kept = batch.get("attention_mask")
        return None if kept is None or kept.shape != logits.shape[:-1] else kept.bool()
    if not shifts:
        return labels != NEVER
    last = torch.full_like(labels[:, :1], NEVER)
    return torch.cat([labels[:, 1:], last], dim=1) != NEVER
