"""What an architecture is: tables that find the attention and feed-forward sub-blocks of a family of models.

Modules are found by the names of their classes and the layers inside them, so transformers is not imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..class_swap import plain_class_of
from .fusion import AttentionFusion, FeedForwardFusion

Kind = Literal["attention", "feed_forward"]


@dataclasses.dataclass(frozen=True)
class SubBlock:
    """An attention or a feed-forward sub-block of one model: some input layers, and the output layer after them.

    A group is `size` consecutive rows of every input layer and the columns of the output layer that read them: a head,
    or (size 1) a neuron of the intermediate dimension.

    Attributes:
        kind: "attention" or "feed_forward".
        name: of the module in the model; recipes and manifests use it.
        inputs: query, key and value, or the first layers of the feed-forward part (two if gated), by full name.
        output: the layer after them.
        size: rows per group.
        table: what describes it.
        module: the module that the table matched.
        package: of the classes that the table describes, see `Family`.
    """

    kind: Kind
    name: str
    inputs: dict[str, nn.Linear]
    output_name: str
    output: nn.Linear
    size: int
    table: Attention | FeedForward
    module: nn.Module
    package: str = ""

    @property
    def groups(self) -> int:
        """Number of heads or neurons that it has now."""
        return self.output.in_features // self.size

    @property
    def core(self) -> nn.Module:
        """The module whose attributes hold the number of heads."""
        assert isinstance(self.table, Attention)
        return self.module.get_submodule(self.table.core)

    @property
    def is_cross_attention(self) -> bool:
        """Whether key and value read another sequence than query."""
        table = self.table
        if not isinstance(table, Attention):
            return False
        return (
            self.name.rpartition(".")[2] in table.cross_names or plain_class_of(self.core).__name__ in table.cross_cores
        )

    def is_own(self, module: nn.Module) -> bool:
        """Return whether a module is of a class that the family describes, and not of one derived from it."""
        return f"{plain_class_of(module).__module__}.".startswith(self.package)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Name the parts of an attention.

    Args:
        classes: names of the classes of the module.
        inputs: paths below it of query, key and value, in this order.
        output: path of the output layer.
        head_size: attribute of `core` with the width of a head.
        resize: called with the core, the heads that stay (their indices in the original model) and the original number
            of heads, before the layers are made smaller.
        core: path of the module with the attributes; "" = the module itself.
        cross_cores: names of the classes of `core` that are cross-attention.
        cross_names: last parts of the names of modules that are cross-attention.
        fusion: how the runtime can compute it in one operator; None = layer by layer.
        heads_alike: heads differ in their weights only, so which of them are left does not matter, only how many.
    """

    classes: frozenset[str]
    inputs: tuple[str, str, str]
    output: str
    head_size: str
    resize: Callable[[nn.Module, Sequence[int], int], None]
    core: str = ""
    cross_cores: frozenset[str] = frozenset()
    cross_names: frozenset[str] = frozenset()
    fusion: AttentionFusion | None = None
    heads_alike: bool = False

    def find(self, name: str, module: nn.Module, package: str = "") -> SubBlock | None:
        """Return the sub-block that a module is, or None."""
        inputs = _layers(name, module, self.classes, (*self.inputs, self.output))
        if inputs is None:
            return None
        (output_name, output) = inputs.popitem()
        size = getattr(module.get_submodule(self.core), self.head_size, None)
        if not isinstance(size, int) or size < 1 or output.in_features % size:
            return None
        return SubBlock("attention", name, inputs, output_name, output, size, self, module, package)


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """Name the parts of a feed-forward sub-block.

    Args:
        classes: names of the classes of the module.
        inputs: paths below it of the first layers; of a gated one, the one under the activation first.
        output: path of the second layer.
        activation: path of the function between them, an attribute.
        name: what is added to the name of the module, where it holds more than this sub-block.
        marks: attributes that tell the class from others of the same name.
        fusion: how the runtime can compute it in one operator; None = layer by layer.
    """

    classes: frozenset[str]
    inputs: tuple[str, ...]
    output: str
    activation: str
    name: str = ""
    marks: tuple[str, ...] = ()
    fusion: FeedForwardFusion | None = None

    def find(self, name: str, module: nn.Module, package: str = "") -> SubBlock | None:
        """Return the sub-block that a module is, or None."""
        inputs = _layers(name, module, self.classes, (*self.inputs, self.output))
        if inputs is None or not all(hasattr(module, mark) for mark in self.marks):
            return None
        (output_name, output) = inputs.popitem()
        return SubBlock("feed_forward", _join(name, self.name), inputs, output_name, output, 1, self, module, package)

    def function(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the activation of a module."""
        function: Any = module
        for part in self.activation.split("."):
            function = getattr(function, part)
        return function

    def act(self, module: nn.Module, values: Tensor) -> Tensor:
        """Apply the activation of a module."""
        return self.function(module)(values)


@dataclasses.dataclass(frozen=True)
class Family:
    """The tables of one model family.

    Args:
        name: for messages.
        package: prefix of the Python modules that define the classes. The runtime fuses only sub-blocks whose classes
            are defined there: a class of the same name elsewhere, or one derived from it, may compute something else.
    """

    name: str
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    package: str = "transformers.models."


FAMILIES: dict[str, Family] = {}
"""Registered families by name, in the order in which they are tried."""


def register_family(family: Family) -> Family:
    """Let pruning, compaction and the runtime know a model family.

    Raises:
        ValueError: if there is a family of this name.
    """
    if family.name in FAMILIES:
        raise ValueError(f"the architecture '{family.name}' is registered twice")
    FAMILIES[family.name] = family
    return family


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _layers(name: str, module: nn.Module, classes: frozenset[str], paths: Sequence[str]) -> dict[str, nn.Linear] | None:
    """Return the layers at these paths by full name, or None if the module is of another class or built otherwise."""
    if not any(base.__name__ in classes for base in type(module).__mro__):
        return None
    found: dict[str, nn.Linear] = {}
    for path in paths:
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            return None
        if not isinstance(layer, nn.Linear):
            return None
        found[_join(name, path)] = layer
    width = list(found.values())[-1].in_features
    fits = all(layer.out_features == width for layer in list(found.values())[:-1])
    return found if fits else None


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of an attention, or None.

    transformers calls it `cache` from 5.24 on, and `past_key_values` before.
    """
    return next((arguments[name] for name in ("cache", "past_key_values") if arguments.get(name) is not None), None)


def fill_cache(module: Any, cache: Any, hidden: Tensor, memory: Tensor | None) -> None:
    """Write empty keys and values of an attention without heads into the cache of a generation.

    Masks and positions are computed from the length of a cache, often that of its first layer.

    Args:
        module: with the `layer_idx` of the attention.
        cache: of transformers, or None.
        hidden: input of the attention.
        memory: input of key and value of a cross-attention; None for self-attention.
    """
    if cache is None:
        return
    index, source = module.layer_idx, hidden if memory is None else memory
    if hasattr(cache, "is_updated"):  # of an encoder-decoder model: two caches in one
        if memory is not None and cache.is_updated.get(index):
            return
        if memory is not None:
            cache.is_updated[index] = True
        cache = cache.self_attention_cache if memory is None else cache.cross_attention_cache
    nothing = torch.zeros((source.shape[0], 1, source.shape[1], 1), dtype=source.dtype, device=source.device)
    cache.update(nothing, nothing, index)
