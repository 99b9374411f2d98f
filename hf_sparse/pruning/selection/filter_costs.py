"""What is left of convolutions in a row: products of the filters that a layer has and of those that it reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...modeling.layer_kinds import Slot


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that gets smaller.

    Args:
        weights: of the layer when dense.
        own: index of the unit whose filters are the filters of this layer; None = all of them stay.
        reads: index of the unit whose filters this layer reads; None = all of them stay.
    """

    weights: int
    own: int | None = None
    reads: int | None = None


@dataclasses.dataclass(frozen=True)
class FilterCosts:
    """Count the weights of the layers around some units of filters.

    Args:
        layers: each of them once.
        filters: of each unit, when dense.
        multiple: filters that leave together.

    Example:
        >>> costs = FilterCosts([Layer(100, own=0), Layer(100, own=1, reads=0)], filters=[10, 10])
        >>> costs.left([5, 10]), costs.left([5, 5])
        (0.5, 0.375)
    """

    layers: Sequence[Layer]
    filters: Sequence[int]
    multiple: int = 1

    @classmethod
    def of(cls, units: Sequence[Any], multiple: int) -> FilterCosts:
        """Return those of `Unit`s of filters."""
        own = {id(unit.source.module): index for index, unit in enumerate(units)}
        reads = {id(unit.module): index for index, unit in enumerate(units)}
        modules = {id(module): module for unit in units for module in (unit.source.module, unit.module)}
        layers = [Layer(math.prod(Slot(module).shape), own.get(key), reads.get(key)) for key, module in modules.items()]
        return cls(layers, [unit.groups for unit in units], multiple)

    def left(self, counts: Sequence[int]) -> float:
        """Return which fraction of the weights of all layers is left.

        Args:
            counts: filters left in each unit.
        """
        shares = [count / of for count, of in zip(counts, self.filters, strict=True)]
        left = 0.0
        for layer in self.layers:
            outputs = 1.0 if layer.own is None else shares[layer.own]
            left += layer.weights * outputs * (1.0 if layer.reads is None else shares[layer.reads])
        return left / sum(layer.weights for layer in self.layers)

    def highest(self, scores: Sequence[Tensor], limit: float) -> tuple[list[Tensor], float]:
        """Keep the highest scores for as long as they can be paid, and the highest of each unit in any case.

        Args:
            scores: of the filters of each unit, or of chunks of `multiple` of them.
            limit: fraction of the weights that may be left.

        Returns:
            Which are kept, and the fraction that is left.
        """
        sizes = [len(tensor) for tensor in scores]
        ranked = [tensor.clone() for tensor in scores]
        for tensor in ranked:
            tensor[tensor.argmax()] = math.inf  # a network without any filter in a layer computes a constant
        unit = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        order = torch.cat(ranked).sort(descending=True, stable=True).indices

        def left(count: int) -> float:
            chunks = unit[order[:count]].bincount(minlength=len(sizes)).tolist()
            return self.left([min(n * self.multiple, most) for n, most in zip(chunks, self.filters, strict=True)])

        low, high = len(sizes), len(order)
        while low < high:  # the most that can be paid: what is left grows with every filter
            middle = (low + high + 1) // 2
            low, high = (middle, high) if left(middle) <= limit * (1 + 1e-9) else (low, middle - 1)
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:low]] = True
        return list(mask.split(sizes)), left(low)
