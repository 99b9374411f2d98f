"""Head importance: how much the loss of single samples reacts to a head, measured on data before pruning."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...config.sparsity import SCORERS
from ...errors import SparsityError
from ...utils.validation import check_bool
from ..unit import Unit
from .base import Scorer


@SCORERS.register("head_importance")
@dataclasses.dataclass
class HeadImportance(Scorer):
    """Score a head by `E_x |dL(x)/dxi|`, `xi` a gate on what it gives: the absolute value per sample, then the mean.

    Args:
        normalize: divide by the L2 norm over the heads of an attention, so that attentions can be compared with each
            other (selection "global" or "budget"); within one attention it changes nothing.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.1.
    """

    source = "heads"
    normalize: bool = True
    measured: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_bool("normalize", self.normalize)

    def on_measurement(self, unit: Unit, sensitivity: Tensor) -> None:
        """Take the measured `E_x |dL(x)/dxi|` of the heads of an attention."""
        values = sensitivity.float()
        if self.normalize:
            values = values / (torch.linalg.vector_norm(values) + 1e-20)
        self.measured[unit.name] = values.to(unit.masked.mask.device)

    def scores(self, unit: Unit) -> Tensor:
        if unit.name not in self.measured:
            raise SparsityError(
                f"scorer '{self.name}' has seen no data: call Pruner.measure(batches), or sparsify with batches"
            )
        return self.measured[unit.name]
