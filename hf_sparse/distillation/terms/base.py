"""What a distillation loss is given, and what it declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ...config.distillation import DistillationConfig

NEVER = -100
"""Label of a position that is not trained, everywhere in transformers."""
EMBEDDING = "sentence_embedding"
"""Name of the output that has one vector for each example, as sentence-transformers has it."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One batch as student and teacher see it.

    Args:
        student, teacher: outputs by name.
        batch: keyword arguments of the model, with labels where there are any.
        config: temperature, layer map.
        share: of the optimizer step that this batch is, where the caller sums batches instead of averaging them.
        shifts_labels: whether the labels of a position are those of the next one (decoder-only language models).
        problem_type: returns the `problem_type` of the student's config; None = unknown.
    """

    student: Mapping[str, Any]
    teacher: Any
    batch: Mapping[str, Any]
    config: DistillationConfig
    share: float = 1.0
    shifts_labels: bool = False
    problem_type: Callable[[], str | None] = lambda: None


@dataclasses.dataclass
class Term:
    """Base of a distillation loss; register it with `TERMS`.

    Attributes:
        name: set by the registration.
        needs: keyword arguments that student and teacher are called with, to return what is compared.
        cached: whether the teacher's part can be written to a cache: logits, or one embedding for each example.
        embeds: whether embeddings are compared.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    cached: ClassVar[bool] = False
    embeds: ClassVar[bool] = False

    @property
    def log_name(self) -> str:
        """Name in the training log."""
        return f"distillation_{self.name}"

    def value(self, pair: Comparison) -> Tensor:
        """Return the loss of a batch, a scalar, times `pair.share`.

        Raises:
            SparsityError: if teacher and student cannot be compared.
        """
        raise NotImplementedError
