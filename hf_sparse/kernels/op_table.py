"""One table of the sparse operators, and the formats of weights that they take: from these `operators` makes them all.

They are `hf_sparse::sparse_linear`, `sparse_ffn`, `sparse_gated_ffn`, `sparse_attention`, `sparse_ffn_norm` and
`sparse_attention_norm`, and the same with `int8_`; of other weight formats the linear layer alone. Names and the order
of the arguments are part of exported programs: they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor

from . import reference
from .library import NativeOps
from .types import AnyWeight, LinearWeight, Norm
from .validation import additive

W = TypeVar("W", bound=LinearWeight)
FusedW = TypeVar("FusedW", bound=AnyWeight)
Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class OpSpec:
    """One operator, whatever its weights are stored in.

    Attributes:
        name: without the prefix of the weight format.
        weights: prefix of the arguments of each weight.
        sizes: integers that give the shapes of several weights; a single one has its own.
        shapes: sizes -> (out, in) of each of several weights.
        has_norm: adds the input and computes a layer norm.
        has_mask: an attention, with mask, heads and scale; all others of a `FusedFormat` have an activation.
        default: of the activation.
    """

    name: str
    weights: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    shapes: Callable[..., Shapes] | None = None
    has_norm: bool = False
    has_mask: bool = False
    default: str | None = None

    def schema(self, form: WeightFormat[Any]) -> str:
        """Return the schema for one weight format."""
        parts = ["Tensor x"]
        for prefix in self.weights:
            parts += [f"{kind} {prefix}{name}" for name, kind in form.tensors.items()]
        parts += ["Tensor norm_weight, Tensor? norm_bias, float norm_eps"] if self.has_norm else []
        parts += ["Tensor? mask"] if self.has_mask else []
        parts += [f"{form.size_type} {size}" for size in self.all_sizes(form)]
        if self.has_mask:
            parts += ["int heads, float scale"]
        elif form.has_activation:
            parts += ["str activation" + ("" if self.default is None else f'="{self.default}"')]
        return f"{form.prefix}_{self.name}({', '.join(parts)}) -> Tensor"

    def all_sizes(self, form: WeightFormat[Any]) -> tuple[str, ...]:
        """Return the names of the integers that describe its weights."""
        if len(self.weights) == 1:
            return form.sizes
        return (*(f"{prefix}rows" for prefix in self.weights), *self.sizes)


def _ffn(hidden: int, out_features: int, in_features: int) -> Shapes:
    return (hidden, in_features), (out_features, hidden)


def _gated_ffn(hidden: int, out_features: int, in_features: int) -> Shapes:
    return (hidden, in_features), (hidden, in_features), (out_features, hidden)


def _ffn_norm(hidden: int, features: int) -> Shapes:
    return (hidden, features), (features, hidden)


def _attention_norm(inner: int, features: int) -> Shapes:
    return (3 * inner, features), (features, inner)


_HIDDEN = ("hidden_features", "out_features", "in_features")

OPS = (
    OpSpec("linear", ("",), default="none"),
    OpSpec("ffn", ("up_", "down_"), _HIDDEN, _ffn),
    OpSpec("gated_ffn", ("gate_", "up_", "down_"), _HIDDEN, _gated_ffn),
    OpSpec("ffn_norm", ("up_", "down_"), ("hidden_features", "features"), _ffn_norm, has_norm=True),
    OpSpec("attention", ("",), has_mask=True),
    OpSpec(
        *("attention_norm", ("", "output_"), ("inner_features", "features"), _attention_norm),
        has_norm=True,
        has_mask=True,
    ),
)


@dataclass(frozen=True)
class WeightFormat(Generic[W]):
    """How weights are stored, and what computes with them: here the linear layer alone, without activation.

    Attributes:
        prefix: of the names of its operators.
        weight: the NamedTuple of a weight. Its fields are arguments of the operators, in their order: the tensors, the
            bias last, and integers that describe them.
        matmul: computes `x @ weight.T + bias`.
        check: refuses a weight whose tensors do not fit together, by their shapes and types alone.
        known: computes with a weight that was checked before, from the arguments after x; None = it was not.
    """

    prefix: str
    weight: type[W]
    matmul: Callable[[Tensor, W], Tensor]
    check: Callable[[W], None] = lambda weight: None
    known: Callable[[Tensor, tuple[Any, ...]], Tensor | None] = lambda x, arguments: None

    ops: ClassVar[tuple[OpSpec, ...]] = OPS[:1]
    size_type: ClassVar[str] = "SymInt"
    has_activation: ClassVar[bool] = False

    @property
    def tensors(self) -> dict[str, str]:
        """The tensors of a weight, and their types in a schema."""
        kinds = {Tensor: "Tensor", Tensor | None: "Tensor?"}
        return {name: kinds[kind] for name, kind in get_type_hints(self.weight).items() if kind is not int}

    @property
    def sizes(self) -> tuple[str, ...]:
        """The integers of a weight."""
        return tuple(name for name, kind in get_type_hints(self.weight).items() if kind is int)

    def forward(self, x: Tensor, weights: Sequence[W], activation: str, norm: Norm | None) -> Tensor:
        """Compute one layer."""
        return self.matmul(x, weights[0])


@dataclass(frozen=True, kw_only=True)
class FusedFormat(WeightFormat[FusedW]):
    """A format with all operators: layers with an activation, and whole sub-blocks.

    Attributes:
        matmul: the reference, where the C++ kernels cannot compute.
        native: the C++ kernels, if they take an input and these weights; else None.
        fuses_norm: (tokens, threads) -> whether C++ computes the layer norm with the feed-forward part.
        fuses_heads: (batch, length, weight) -> whether C++ computes heads, on tiles of each sequence.
    """

    native: Callable[[Tensor, Sequence[FusedW]], NativeOps | None]
    fuses_norm: Callable[[int, int], bool]
    fuses_heads: Callable[[int, int, FusedW], bool]

    ops: ClassVar[tuple[OpSpec, ...]] = OPS
    size_type: ClassVar[str] = "int"
    has_activation: ClassVar[bool] = True

    def forward(self, x: Tensor, weights: Sequence[FusedW], activation: str, norm: Norm | None) -> Tensor:
        """Compute one layer, or (gate,) up and down; with a norm, that of the sum of x and the output."""
        native = self.native(x, weights)
        if native is None:
            out = reference.forward(x, weights, activation, self.matmul)
            return out if norm is None else reference.normalize(out, x, norm)
        if len(weights) == 1:
            return native.linear(x, weights[0], activation)
        if norm is None or self.fuses_norm(x.shape[:-1].numel(), torch.get_num_threads()):
            return native.ffn(x, weights, activation, norm)
        return reference.normalize(native.ffn(x, weights, activation, None), x, norm)

    def attention(
        self, x: Tensor, weights: Sequence[FusedW], norm: Norm | None, mask: Tensor | None, heads: int, scale: float
    ) -> Tensor:
        """Compute all heads; with a second weight and a norm, the output layer and the norm of the sum with x."""
        native = self.native(x, weights) if mask is None or mask.is_cpu else None
        first, batch, length = weights[0], x.shape[0], x.shape[1]
        if native is not None and first.out_features and self.fuses_heads(batch, length, first):
            return native.attention(x, weights, norm, additive(mask, x), heads, scale)
        linear = self.reference_linear if native is None else native.linear
        out = reference.attention(linear(x, first, "none"), heads, mask, scale)
        return out if norm is None else reference.normalize(linear(out, weights[1], "none"), x, norm)

    def reference_linear(self, x: Tensor, weight: FusedW, activation: str) -> Tensor:
        """Compute one layer by the reference."""
        return reference.forward(x, (weight,), activation, self.matmul)
