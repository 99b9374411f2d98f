"""What of a model can be packed: single layers, and sub-blocks whose layers compute together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels import KERNELS
from ..modeling.architectures import SubBlock, known_sub_blocks
from . import fused_attention, fused_ffn
from .fused_parts import any_observed
from .huge_pages import HugePages
from .lazy_weights import materialize
from .packed_linear import become_packed
from .packed_weight import Packed, RoundingErrors

Form = Literal["linear", "ffn", "qkv", "gate_up"]
"""A layer alone; a whole feed-forward sub-block; query, key and value as one matmul; gate and up as one."""

JOINT = ("qkv", "gate_up")
"""Forms whose layers have one packed weight."""


@dataclasses.dataclass(frozen=True)
class PackCandidate:
    """Layers that are packed together or not at all.

    Attributes:
        kernel: name of the kernel.
        packed: one per layer; of the `JOINT` forms one for all.
        block: the sub-block of all forms but "linear".
        activation: of "ffn", as the operators name it.
        dense_up_to: token count up to which a call computes with the dense weights, which are kept for it.
    """

    form: Form
    kernel: str
    names: tuple[str, ...]
    layers: tuple[nn.Linear, ...]
    packed: tuple[Packed, ...]
    block: SubBlock | None = None
    activation: str | None = None
    dense_up_to: int = 0

    @property
    def report_name(self) -> str:
        """The kernel as the report names it."""
        return KERNELS[self.kernel].report_name(self.form)

    @property
    def head_size(self) -> int | None:
        """Width of the heads of an attention whose heads are computed in the same operator; else None."""
        if self.form != "qkv" or self.block is None or not KERNELS[self.kernel].fused:
            return None
        return None if fused_attention.fusion_of(self.block) is None else self.block.size

    def moved(self, memory: HugePages) -> PackCandidate:
        """Return the candidate with what its kernel reads in this memory."""
        packed = tuple(each._replace(operands=memory.take(each.operands)) for each in self.packed)
        return dataclasses.replace(self, packed=packed)

    def pack(self, layers: Sequence[nn.Linear], keep_dense: bool) -> None:
        """Turn layers with these weights into packed ones, in place."""
        if self.form in JOINT:
            become_packed(layers, self.packed[0], keep_dense, self.dense_up_to, self.form)
            return
        for layer, packed in zip(layers, self.packed, strict=True):
            become_packed([layer], packed, keep_dense, self.dense_up_to)

    def fuse(self) -> None:
        """Let the sub-block of packed layers compute in one operator."""
        if self.block is not None and self.form == "qkv":
            fused_attention.fuse(self.block)
        elif self.block is not None and self.form == "gate_up":
            fused_ffn.share_gate(self.block)
        elif self.block is not None and self.form == "ffn":
            fused_ffn.fuse(self.block, self.activation)

    def dense_run(self, x: Tensor) -> Callable[[], object]:
        """Return the computation with dense layers, for timing."""
        layers = self._copies()
        if (size := self.head_size) is not None:
            return partial(fused_attention.heads_dense, layers, size, size**-0.5, x)
        if self.activation is not None:
            return partial(fused_ffn.multiply_dense, layers, x, fused_ffn.ACTIVATIONS[self.activation])
        return lambda: [layer(x) for layer in layers]

    def packed_run(self, x: Tensor) -> Callable[[], object]:
        """Return the same with packed layers: the overhead of calling a module counts too."""
        layers: list[Any] = self._copies()
        self.pack(layers, keep_dense=False)
        if (size := self.head_size) is not None:
            return partial(fused_attention.heads, layers[0], size, size**-0.5, x)
        if self.activation is not None:
            return partial(fused_ffn.multiply, layers, x, self.activation)
        if self.form in JOINT:
            return partial(fused_attention.multiply_joint, layers, x)
        return lambda: [layer(x) for layer in layers]

    def errors(self) -> dict[str, RoundingErrors]:
        """Measure the errors of rounded matmuls; layers that are one matmul have one error."""
        if self.form in JOINT:
            return dict.fromkeys(self.names, self.packed[0].errors(torch.cat([layer.weight for layer in self.layers])))
        parts = zip(self.names, self.layers, self.packed, strict=True)
        return {name: packed.errors(layer.weight) for name, layer, packed in parts}

    def _copies(self) -> list[nn.Linear]:
        """Return plain layers with these weights and biases, without hooks."""
        copies = []
        for layer in self.layers:
            copied = nn.Linear(layer.in_features, layer.out_features, device="meta")
            copied.weight, copied.bias = layer.weight, layer.bias
            copies.append(copied.eval())
        return copies


@dataclasses.dataclass(frozen=True)
class CandidateGroup:
    """A candidate, and what can be packed in its place.

    Attributes:
        split: makes the candidates of its layers one by one; of a single layer there are none.
    """

    candidate: PackCandidate
    split: Callable[[], list[PackCandidate]]


class Candidates:
    """Make candidates from layers of a model.

    Args:
        layers: that may be packed, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear], kernel: str) -> None:
        self.model, self.layers, self.kernel = model, layers, kernel

    def groups(self) -> Iterator[CandidateGroup]:
        """Yield a group for each sub-block or layer, so that each layer is in one.

        Lazy weights are materialized here: whoever packs a group before the next one has one of them dense at a time.
        """
        grouped: set[str] = set()
        for block in self._blocks():
            together = self._together(block)
            if together is not None and grouped.isdisjoint(together.names):
                grouped.update(together.names)
                yield CandidateGroup(together, partial(self._split, together))
        for name in self.layers:
            if name not in grouped:
                yield CandidateGroup(self.single(name), list)

    def of(self, names: Sequence[str]) -> list[CandidateGroup]:
        """Return the groups of these layers alone."""
        return list(Candidates(self.model, {name: self.layers[name] for name in names}, self.kernel).groups())

    def single(self, name: str) -> PackCandidate:
        """Return the candidate of one layer alone."""
        layer = self.layers[name]
        materialize([layer])
        packed = Packed.of(layer.weight, self.kernel)
        return PackCandidate("linear", self.kernel, (name,), (layer,), (packed,))

    def _split(self, together: PackCandidate) -> list[PackCandidate]:
        if together.form in JOINT:
            return [self.single(name) for name in together.names]
        parts = zip(together.names, together.layers, together.packed, strict=True)
        return [PackCandidate("linear", self.kernel, (name,), (layer,), (packed,)) for name, layer, packed in parts]

    def _blocks(self) -> Iterable[SubBlock]:
        kernel = KERNELS[self.kernel]
        return known_sub_blocks(self.model) if kernel.fused or kernel.joins is not None else ()

    def _together(self, block: SubBlock) -> PackCandidate | None:
        if block.kind == "attention":
            return self._attention(block)
        return self._feed_forward(block) if KERNELS[self.kernel].fused else self._gate_up(block)

    def _joint(self, form: Form, names: tuple[str, ...], block: SubBlock) -> PackCandidate | None:
        """Return layers with the same input as one matmul, where the kernel gains by that."""
        layers, joins = tuple(self.layers[name] for name in names), KERNELS[self.kernel].joins
        if len({layer.bias is None for layer in layers}) > 1 or any_observed(layers):
            return None
        materialize(layers)
        weights = [layer.weight.detach() for layer in layers]
        if joins is not None and not joins(weights):
            return None
        packed = Packed.of(torch.cat(weights), self.kernel)
        return PackCandidate(form, self.kernel, names, layers, (packed,), block)

    def _gate_up(self, block: SubBlock) -> PackCandidate | None:
        """Return the gate and what it multiplies as one matmul."""
        names = tuple(block.inputs)
        if len(names) < 2 or not all(name in self.layers for name in names) or not fused_ffn.shares_input(block):
            return None
        return self._joint("gate_up", names, block)

    def _attention(self, block: SubBlock) -> PackCandidate | None:
        """Return query, key and value as one matmul, if they have the same input."""
        names = tuple(block.inputs)
        if len(names) < 3 or block.is_cross_attention or not all(name in self.layers for name in names):
            return None
        return self._joint("qkv", names, block)

    def _feed_forward(self, block: SubBlock) -> PackCandidate | None:
        """Return a whole feed-forward sub-block, if an operator computes what it computes."""
        names = (*block.inputs, block.output_name)
        if not all(name in self.layers for name in names) or not fused_ffn.is_fusible(block):
            return None
        activation, layers = fused_ffn.activation_of(block), tuple(self.layers[name] for name in names)
        gated_with_bias = len(block.inputs) > 1 and any(layer.bias is not None for layer in layers)
        if activation is None or gated_with_bias or any_observed(fused_ffn.modules_inside(block)):
            return None
        singles = [self.single(name) for name in names]
        packed = tuple(single.packed[0] for single in singles)
        return PackCandidate("ffn", self.kernel, names, layers, packed, block, activation)
