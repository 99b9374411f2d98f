"""What an architecture is: tables that find the attention and feed-forward sub-blocks of a family of models.

Modules are found by the names of their classes and the layers inside them, so nothing of transformers is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Kind = Literal["attention", "feed_forward"]


@dataclasses.dataclass(frozen=True)
class SubBlock:
    """An attention or a feed-forward sub-block of one model: rows of some layers whose results meet columns of another.

    A group is `size` consecutive rows of every input layer and the columns of the output layer that read them: a head,
    or (size 1) a neuron.

    Attributes:
        kind: "attention" or "feed_forward".
        name: of the module in the model; recipes and manifests use it.
        inputs: query, key and value, or the first layers of the feed-forward part (two if gated), by full name.
        output: the layer after them.
        size: rows per group.
        table: where it was found.
        module: that has the name.
    """

    kind: Kind
    name: str
    inputs: dict[str, nn.Linear]
    output_name: str
    output: nn.Linear
    size: int
    table: Attention | FeedForward
    module: nn.Module

    @property
    def groups(self) -> int:
        """Number of heads or neurons that it has now."""
        return self.output.in_features // self.size

    @property
    def core(self) -> nn.Module:
        """The module whose attributes say how many heads there are."""
        assert isinstance(self.table, Attention)
        return self.module.get_submodule(self.table.core)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Name the parts of an attention.

    Args:
        classes: names of the classes of the module.
        inputs: paths below it of query, key and value, in this order.
        output: path of the output layer.
        head_size: attribute of `core` with the width of a head.
        resize: told the core, the heads that stay (numbers in the model as it was made) and how many there were then;
            called before the layers are cut.
        core: path of the module with the attributes; "" = the module itself.
    """

    classes: frozenset[str]
    inputs: tuple[str, str, str]
    output: str
    head_size: str
    resize: Callable[[nn.Module, Sequence[int], int], None]
    core: str = ""

    def find(self, name: str, module: nn.Module) -> SubBlock | None:
        """Return the sub-block that a module is, or None."""
        inputs = _layers(name, module, self.classes, (*self.inputs, self.output))
        if inputs is None:
            return None
        (output_name, output) = inputs.popitem()
        size = getattr(module.get_submodule(self.core), self.head_size, None)
        if not isinstance(size, int) or size < 1 or output.in_features % size:
            return None
        return SubBlock("attention", name, inputs, output_name, output, size, self, module)


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """Name the parts of a feed-forward sub-block.

    Args:
        classes: names of the classes of the module.
        inputs: paths below it of the first layers; of a gated one, the one under the activation first.
        output: path of the second layer.
        activation: path of the function between them, an attribute.
        name: what is added to the name of the module, where it holds more than this sub-block.
        marks: attributes that tell the class from others that have its name.
    """

    classes: frozenset[str]
    inputs: tuple[str, ...]
    output: str
    activation: str
    name: str = ""
    marks: tuple[str, ...] = ()

    def find(self, name: str, module: nn.Module) -> SubBlock | None:
        """Return the sub-block that a module is, or None."""
        inputs = _layers(name, module, self.classes, (*self.inputs, self.output))
        if inputs is None or not all(hasattr(module, mark) for mark in self.marks):
            return None
        (output_name, output) = inputs.popitem()
        return SubBlock("feed_forward", _join(name, self.name), inputs, output_name, output, 1, self, module)

    def act(self, module: nn.Module, values: Tensor) -> Tensor:
        """Apply the activation of a module."""
        function: Any = module
        for part in self.activation.split("."):
            function = getattr(function, part)
        return function(values)


@dataclasses.dataclass(frozen=True)
class Family:
    """The tables of one family of models.

    Args:
        name: for messages.
    """

    name: str
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]


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


class Changed:
    """Mixin of modules whose class was changed by `become`, so that they are copied and pickled as what they are."""

    mixin: ClassVar[type[Changed]]
    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.mixin, self.plain), self.__dict__


_CHANGED: dict[tuple[type[Changed], type[nn.Module]], type[nn.Module]] = {}


def _changed_class(mixin: type[Changed], plain: type[nn.Module]) -> type[nn.Module]:
    key = (mixin, plain)
    if key not in _CHANGED:
        name = f"{mixin.__name__}{plain.__name__}"
        _CHANGED[key] = type(name, key, {"mixin": mixin, "plain": plain, "__module__": mixin.__module__})
    return _CHANGED[key]


def _blank(mixin: type[Changed], plain: type[nn.Module]) -> nn.Module:
    cls = _changed_class(mixin, plain)
    return cls.__new__(cls)


def become(module: nn.Module, mixin: type[Changed]) -> None:
    """Let a module behave as `mixin` says, and otherwise as before; its parameters, names and hooks stay."""
    plain = getattr(type(module), "plain", type(module))
    module.__class__ = _changed_class(mixin, plain)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of an attention, or None.

    transformers calls it `cache` from 5.24 on, and `past_key_values` before.
    """
    return next((arguments[name] for name in ("cache", "past_key_values") if arguments.get(name) is not None), None)


def fill_cache(module: Any, cache: Any, hidden: Tensor, memory: Tensor | None) -> None:
    """Write into the cache of a generation what an attention without heads has to: how many positions there were.

    Masks and positions are computed from the lengths of a cache, often those of its first layer.

    Args:
        module: with the `layer_idx` of the attention.
        cache: of transformers, or None.
        hidden: what the attention is given.
        memory: what a cross-attention looks at; None for self-attention.
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
