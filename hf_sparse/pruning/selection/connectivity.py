"""Static connectivity: which inputs each output has, by a seed and the shape alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import Selection, kept_count
from .topk import refuse_nan

Kind = Literal["expander", "radix", "random"]


@dataclasses.dataclass
class Connectivity(Selection):
    """Keep as many inputs of each output, whatever the scores are; what connectivity patterns do, not for a recipe.

    More sparsity keeps a part of what less keeps, so masks only lose entries as a schedule rises.

    Args:
        kind: see the patterns of these names.
        seed: of the draw; weights of a group differ by their order.
    """

    kind: Kind
    seed: int
    name: ClassVar[str] = "connectivity"

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        refuse_nan(scores)
        kept = []
        for index, tensor in enumerate(scores):
            rank = ranks(self.kind, tensor.shape[0], tensor.shape[1], self.seed + index)
            kept.append((rank < kept_count(tensor.shape[1], sparsity)).to(tensor.device))
        return kept


def ranks(kind: Kind, rows: int, columns: int, seed: int) -> Tensor:
    """Return in which order the inputs of each output are kept: each row is a permutation of the columns.

    Shapes: -> int64 `(rows, columns)`.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.rand(rows, columns, generator=generator).argsort(1).argsort(1)
    # Output i with shift s has the input (place of i + s) mod columns: every shift is a perfect matching, or as near to
    # one as the sides allow, so that inputs are used evenly.
    place = torch.arange(rows) % columns if rows >= columns else torch.arange(rows) * columns // rows
    order = torch.randperm(columns, generator=generator) if kind == "expander" else _radical_inverse(columns)
    rank = torch.empty(columns, dtype=torch.int64)
    rank[_evenly(order, max(1, columns // rows))] = torch.arange(columns)
    names = torch.randperm(columns, generator=generator) if kind == "expander" else torch.arange(columns)
    if kind == "expander":
        place = place[torch.randperm(rows, generator=generator)]
    return rank[(names[None, :] - place[:, None]) % columns]


def _radical_inverse(count: int) -> Tensor:
    """Return numbers below `count` in bit-reversed order: the first 2^k of them are about equally far apart."""
    bits = max(1, (count - 1).bit_length())
    numbers = torch.arange(1 << bits)
    reverse = sum((((numbers >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)), torch.zeros_like(numbers))
    return reverse[reverse < count]


def _evenly(order: Tensor, period: int) -> Tensor:
    """Return an order in which every `period` consecutive numbers have all remainders, otherwise as given."""
    seen: dict[int, int] = {}
    turns = []
    for number in order.tolist():
        turn = seen.get(number % period, 0)
        seen[number % period] = turn + 1
        turns.append(turn)
    return order[torch.tensor(turns).argsort(stable=True)]
