"""What an architecture is: tables that find the attention and feed-forward sub-blocks of a family of models.

Modules are found by the names of their classes and the layers inside them, so transformers is not imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..class_swap import plain_class_of
from ..layer_kinds import is_linear, is_plain, matrix_shape
from ..model_state import HEADS_PER_KV
from .experts import Experts
from .filters import Filters
from .fusion import AttentionFusion, FeedForwardFusion
from .parts import Layout, Part, exit_part, input_parts

Kind = Literal["attention", "feed_forward", "convolution"]


@dataclasses.dataclass(frozen=True)
class SubBlock:
    """An attention or a feed-forward sub-block of one model: some input layers, and the output layer after them.

    A group is a head, or a neuron of the intermediate dimension: lines of the input layers, and the columns of the
    output layer that read them. With grouped queries several heads read one KV head.

    Attributes:
        kind: "attention" or "feed_forward".
        name: of the module in the model; recipes and manifests use it.
        parts: query, key and value, or the first layers of the feed-forward part (two if gated), in this order.
        exit: the columns of the layer after them.
        table: what describes it.
        module: the module that the table matched.
        package: of the classes that the table describes, see `Family`.
        heads_per_kv: number of heads that read each KV head, in the order of the heads; empty for neurons.
    """

    kind: Kind
    name: str
    parts: tuple[Part, ...]
    exit: Part
    table: Attention | FeedForward
    module: nn.Module
    package: str = ""
    heads_per_kv: tuple[int, ...] = ()

    @property
    def inputs(self) -> dict[str, Any]:
        """The input layers by full name, each once."""
        return {part.name: part.layer for part in self.parts}

    @property
    def output_name(self) -> str:
        """Full name of the output layer."""
        return self.exit.name

    @property
    def output(self) -> Any:
        """The output layer."""
        return self.exit.layer

    @property
    def size(self) -> int:
        """Columns of each group in the output layer."""
        return self.exit.size

    @property
    def groups(self) -> int:
        """Number of heads or neurons that it has now."""
        return self.exit.count

    @property
    def kv_of(self) -> tuple[int, ...]:
        """Which KV head each head reads."""
        return tuple(kv for kv, heads in enumerate(self.heads_per_kv) for _ in range(heads))

    @property
    def is_grouped(self) -> bool:
        """Whether several heads read one KV head (grouped queries)."""
        return any(part.shared for part in self.parts)

    @property
    def is_plain(self) -> bool:
        """Whether all layers store `(out, in)` and each input layer is one part with a line for each column."""
        layers = [*self.inputs.values(), self.output]
        same = all(part.count * part.size == self.groups * self.size for part in self.parts)
        return len(layers) == len(self.parts) + 1 and same and all(map(is_plain, layers))

    @property
    def layer_names(self) -> list[str]:
        """Full names of the layers that get smaller."""
        return [*self.inputs, self.output_name]

    @property
    def config_values(self) -> dict[str, int] | None:
        """Keys of the config, and what they would have to be for this sub-block; None if they cannot express it."""
        table = self.table
        if isinstance(table, FeedForward):
            return {table.key: self.groups} if table.key is not None and self.groups else None
        if table.keys is None or len(set(self.heads_per_kv)) != 1:
            return None
        keys = table.keys
        return {keys.heads: self.groups, keys.kv_heads: len(self.heads_per_kv), keys.size: self.size}

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
class Heads:
    """The heads that an attention keeps.

    Attributes:
        kept: their numbers in the model that `config.json` describes.
        before: how many there were.
        per_kv: of those that stay, how many read each KV head that stays.
    """

    kept: tuple[int, ...]
    before: int
    per_kv: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class HeadKeys:
    """Keys of a config that hold the numbers of heads of all its attentions.

    Args:
        heads: key with the number of heads.
        kv_heads: key with the number of KV heads.
        size: key with the width of a head, which is no longer the hidden size divided by the heads.
    """

    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    size: str = "head_dim"


@dataclasses.dataclass(frozen=True)
class Attention:
    """Name the parts of an attention.

    Args:
        classes: names of the classes of the module.
        inputs: paths below it of query, key and value, in this order; the same path for parts of a fused projection.
        output: path of the output layer.
        head_size: attribute of `core` with the width of a head.
        resize: called with the core and the heads that stay, before the layers are made smaller.
        core: path of the module with the attributes; "" = the module itself.
        cross_cores: names of the classes of `core` that are cross-attention.
        cross_names: last parts of the names of modules that are cross-attention.
        fusion: how the runtime can compute it in one operator; None = layer by layer.
        heads_alike: heads differ in their weights only, so which of them are left does not matter, only how many.
        layout: of a fused projection.
        absent: attributes of `core` that tell a class of the same name, which is not meant, from this one.
        keys: of the config, where it can express that all attentions lose equally many heads; None = it cannot.
    """

    classes: frozenset[str]
    inputs: tuple[str, str, str]
    output: str
    head_size: str
    resize: Callable[[nn.Module, Heads], None]
    core: str = ""
    cross_cores: frozenset[str] = frozenset()
    cross_names: frozenset[str] = frozenset()
    fusion: AttentionFusion | None = None
    heads_alike: bool = False
    layout: Layout = "sections"
    absent: tuple[str, ...] = ()
    keys: HeadKeys | None = None

    def find(self, name: str, module: nn.Module, package: str = "") -> SubBlock | None:
        """Return the sub-block that a module is, or None."""
        layers = _layers(name, module, self.classes, (*self.inputs, self.output))
        if layers is None:
            return None
        *inputs, output = layers
        core = module.get_submodule(self.core)
        if any(hasattr(core, attribute) for attribute in self.absent):
            return None
        size = getattr(core, self.head_size, None)
        leaving = exit_part(*output, size) if isinstance(size, int) and size > 0 else None
        if leaving is None or not isinstance(size, int):
            return None
        heads = leaving.count
        kv_heads = self._kv_heads(inputs, heads, size)
        per_kv = HEADS_PER_KV.get(core)
        if per_kv is None:
            per_kv = (heads // kv_heads,) * kv_heads if kv_heads else ()
        shared = kv_heads != heads or per_kv != (1,) * heads
        parts = input_parts(inputs, (heads, kv_heads, kv_heads), size, self.layout, (False, shared, shared))
        if parts is None or len(per_kv) != kv_heads or sum(per_kv) != heads:
            return None
        return SubBlock("attention", name, parts, leaving, self, module, package, per_kv)

    def _kv_heads(self, inputs: Sequence[tuple[str, Any]], heads: int, size: int) -> int:
        _, (_, key), (_, value) = inputs
        outputs = matrix_shape(key)[0] // size
        if key is not value:
            return outputs
        return heads if self.layout == "interleaved" else (outputs - heads) // 2


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """Name the parts of a feed-forward sub-block.

    Args:
        classes: names of the classes of the module.
        inputs: paths below it of the first layers; of a gated one, the one under the activation first. The same path
            twice for a fused projection of both.
        output: path of the second layer.
        activation: path of the function between them, an attribute.
        name: what is added to the name of the module, where it holds more than this sub-block.
        marks: attributes that tell the class from others of the same name.
        fusion: how the runtime can compute it in one operator; None = layer by layer.
        key: of the config, with the number of neurons of all feed-forward sub-blocks; None = it cannot express that.
        width: attribute of the module with the number of neurons, where it has one.
    """

    classes: frozenset[str]
    inputs: tuple[str, ...]
    output: str
    activation: str
    name: str = ""
    marks: tuple[str, ...] = ()
    fusion: FeedForwardFusion | None = None
    key: str | None = None
    width: str = "intermediate_size"

    def find(self, name: str, module: nn.Module, package: str = "") -> SubBlock | None:
        """Return the sub-block that a module is, or None."""
        layers = _layers(name, module, self.classes, (*self.inputs, self.output))
        if layers is None or not all(hasattr(module, mark) for mark in self.marks):
            return None
        *inputs, output = layers
        leaving = exit_part(*output, 1)
        assert leaving is not None
        number = len(inputs)
        parts = input_parts(inputs, (leaving.count,) * number, 1, "sections", (False,) * number)
        if parts is None:
            return None
        return SubBlock("feed_forward", _join(name, self.name), parts, leaving, self, module, package)

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
    attentions: tuple[Attention, ...] = ()
    feed_forwards: tuple[FeedForward, ...] = ()
    filters: tuple[Filters, ...] = ()
    experts: tuple[Experts, ...] = ()
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


def _layers(
    name: str, module: nn.Module, classes: frozenset[str], paths: Sequence[str]
) -> list[tuple[str, Any]] | None:
    """Return full name and layer of each path, or None if the module is of another class or built otherwise."""
    if not any(base.__name__ in classes for base in type(module).__mro__):
        return None
    found = []
    for path in paths:
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            return None
        if not is_linear(layer):
            return None
        found.append((_join(name, path), layer))
    return found
