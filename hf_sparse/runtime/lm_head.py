"""The product with the vocabulary: it stays dense, and for a few tokens an own kernel reads its weight.

A model that generates multiplies one token with the whole table of the vocabulary at each step, which soon takes most
of the time that pruning has left. The weight, what is tied to it and the state dict stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..kernels.dense_gemv import dense_linear
from ..modeling.architectures.base import Changed, become
from .autotune import Race, SpeedTable, Trial

KERNEL = "dense_few"
"""Of the report: dense, by another kernel for a few tokens."""

TOKENS = (1, 16, 128)
"""Numbers of tokens that are timed. The least has to gain; the others must not lose."""

LOSS = 0.03
"""What the others may lose, as a fraction: two runs of the same product differ by as much."""


class Vocabulary(Changed):
    """A dense layer that is read by the own kernel where a few tokens are multiplied with it."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`.

        Shapes: `(..., in_features)` -> `(..., out_features)`
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            out: Tensor = super().forward(x)  # type: ignore[misc]
            return out
        return dense_linear(x, self.weight, self.bias)


def vocabulary_of(model: nn.Module) -> nn.Linear | None:
    """Return the layer that multiplies with the vocabulary of a model that generates, if another kernel can read it."""
    can, head = getattr(model, "can_generate", None), getattr(model, "get_output_embeddings", None)
    if not callable(can) or not can() or not callable(head):
        return None
    layer = head()
    if type(layer) is not nn.Linear or "forward" in vars(layer) or parametrize.is_parametrized(layer):
        return None
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return layer if plain and min(weight.shape) > 1 else None


@torch.no_grad()
def races(layer: nn.Linear, table: SpeedTable, tokens: Iterable[int] = TOKENS) -> dict[int, Race]:
    """Return what the layer takes as it is ("dense") and by the own kernel ("packed"), by tokens."""
    weight, bias = layer.weight.detach(), layer.bias
    found = {}
    for count in tokens:
        x = torch.randn(count, layer.in_features)
        trial = Trial(KERNEL, (tuple(weight.shape),), 0, (0,), count)
        found[count] = table.race(
            trial,
            lambda x=x: nn.functional.linear(x, weight, bias),  # type: ignore[misc]
            lambda x=x: dense_linear(x, weight, bias),  # type: ignore[misc]
        )
    return found


def pays(found: dict[int, Race]) -> bool:
    """Return whether the least number of tokens gains, and no other loses."""
    return found[min(found)].won and all(race.gain >= 1.0 - LOSS for race in found.values())


def read_fast(layer: nn.Linear) -> None:
    """Let the own kernel read the layer."""
    become(layer, Vocabulary)


def restore(model: nn.Module) -> None:
    """Give the layer of a model the class that it had."""
    for module in model.modules():
        if isinstance(module, Vocabulary):
            module.__class__ = module.plain  # type: ignore[assignment]
