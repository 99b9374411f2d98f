"""Heads, neurons and sub-blocks (structured pruning): groups that go through several weights of a model at once.

Which weights these are, an architecture knows; a pattern here says how each of them is divided. What is pruned can be
removed from the model afterwards (`hf_sparse.compact`), which makes it smaller and faster on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from ...config.sparsity import PATTERNS
from ...errors import PatternError
from ...modeling.architectures import Kind, Part, SubBlock
from ...utils.validation import check_positive_int
from ..selection import Global, Selection
from .base import Pattern, Shape
from .lines import AssignedLines, Lines


class Structure(Pattern):
    """Base of the patterns that need an architecture.

    Attributes:
        kinds: the sub-blocks that have such groups.
        unit: what a group is: a head or a neuron ("own"), a KV head with all heads that read it ("kv_head"), or all of
            a sub-block ("all").
    """

    kinds: ClassVar[tuple[Kind, ...]]
    unit: ClassVar[Literal["own", "kv_head", "all"]] = "own"
    structural = True

    def __str__(self) -> str:
        return self.name

    def groups(self, block: SubBlock) -> int:
        """Return how many groups a sub-block has."""
        return {"own": block.groups, "kv_head": len(block.heads_per_kv) or block.groups, "all": 1}[self.unit]

    def owners(self, block: SubBlock, part: Part) -> Sequence[int] | None:
        """Return the group of each head or neuron of a part; None if they belong to none."""
        if self.unit == "all":
            return (0,) * part.count
        if self.unit == "kv_head" and block.is_grouped:
            return range(part.count) if part.shared else block.kv_of
        return None if part.shared else range(part.count)

    def divide(self, block: SubBlock, parts: Sequence[Part]) -> Pattern | None:
        """Return how the weight of one layer of a sub-block is divided.

        Args:
            parts: those that the layer holds.

        Returns:
            None if nothing of the layer belongs to a group: keys and values that several heads read.
        """
        owned = [(part, self.owners(block, part)) for part in parts]
        if all(owners is None for _, owners in owned):
            return None
        (first, *others), axis = parts, parts[0].axis
        if not others and first.covers_layer:
            if self.unit == "all":
                return Lines(axis, 0)
            if owned[0][1] == range(self.groups(block)):
                return Lines(axis, first.size)
        lines = torch.full((first.layer.weight.shape[axis],), -1)
        for part, owners in owned:
            if owners is not None:
                lines[part.lines()] = torch.tensor(list(owners))[:, None]
        return AssignedLines(axis, self.groups(block), tuple(lines.tolist()))

    def check(self, shape: Shape, where: str) -> None:
        super().check(shape, where)
        raise PatternError(
            f"pattern {self.name} spans several weights of a sub-block and does not fit one weight alone, such as "
            f"'{where}'"
        )


@dataclasses.dataclass(frozen=True)
class InMultiples(Structure):
    """Base of the patterns with neurons or filters, whose number is free.

    Args:
        multiple_of: of neurons and filters, each layer keeps a multiple of this or all that it has; those that leave
            together are neighbors in the order of their scores. Matrix kernels divide their work into pieces of 8, 16
            or 32, and a layer with 410 filters may take the time of one with 416.
    """

    multiple_of: int = 1

    def __post_init__(self) -> None:
        check_positive_int("multiple_of", self.multiple_of)

    def multiple(self, kind: str | None) -> int:
        return 1 if kind == "attention" else self.multiple_of


@PATTERNS.register("head")
@dataclasses.dataclass(frozen=True)
class Head(Structure):
    """Attention heads: rows of query, key and value with their biases, and the columns of the output layer.

    With grouped queries a head is a query head: key and value, which several heads read, leave with the last of them.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?".
    """

    kinds = ("attention",)


@PATTERNS.register("kv_head")
@dataclasses.dataclass(frozen=True)
class KVHead(Structure):
    """KV heads, each with all query heads that read it (grouped queries); elsewhere the same as heads.

    What is removed makes the cache of a generation smaller, which single query heads do not.

    Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 2.2.
    """

    kinds = ("attention",)
    unit = "kv_head"


@PATTERNS.register("kv_head+neuron")
@dataclasses.dataclass(frozen=True)
class KVHeadNeuron(InMultiples):
    """KV heads of all attentions and neurons of all feed-forward parts, which share one selection."""

    kinds = ("attention", "feed_forward")
    unit = "kv_head"


@PATTERNS.register("neuron")
@dataclasses.dataclass(frozen=True)
class Neuron(InMultiples):
    """Neurons: a row of the first feed-forward layer (of both, if gated) with its bias, and a column of the last.

    Source: Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 3 (rows and columns of the "hybrid").
    """

    kinds = ("feed_forward",)


@PATTERNS.register("head+neuron")
@dataclasses.dataclass(frozen=True)
class HeadNeuron(InMultiples):
    """Heads of all attentions and neurons of all feed-forward parts, which share one selection: a budget, above all."""

    kinds = ("attention", "feed_forward")


@PATTERNS.register("filter")
@dataclasses.dataclass(frozen=True)
class Filter(InMultiples):
    """Filters of convolutions in a row: what the next layer reads of them is masked, so they compute nothing.

    `hf_sparse.compact` removes them with their entries of the batch norm. Scorers of weights look at the filter itself
    (`magnitude`: its L1 norm), those of gradients at the weights that read it.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.
    """

    kinds = ("convolution",)


@PATTERNS.register("layer")
@dataclasses.dataclass(frozen=True)
class Layer(Structure):
    """Whole attention or feed-forward sub-blocks, all heads or neurons of one; its output bias, a constant, stays.

    They compete with each other over the model: of one sub-block alone no fraction can be removed.
    """

    kinds = ("attention", "feed_forward")

    unit = "all"

    def own_selection(self) -> Selection:
        return Global()
