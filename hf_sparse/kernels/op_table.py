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
from .c_structures import Described
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


@dataclass(frozen=True, kw_only=True)
class FusedFormat(WeightFormat[FusedW]):
    """A format with all operators: layers with an activation, and whole sub-blocks.

    Attributes:
        matmul: the reference, where the C++ kernels cannot compute.
        loaded: returns the C++ kernels, None where there are none.
        fuses_heads: (batch, length, rows of a block) -> whether C++ computes heads, on tiles of each sequence.
    """

    loaded: Callable[[], NativeOps | None]
    fuses_heads: Callable[[int, int, int], bool]

    ops: ClassVar[tuple[OpSpec, ...]] = OPS
    size_type: ClassVar[str] = "int"
    has_activation: ClassVar[bool] = True

    def native_for(self, x: Tensor) -> NativeOps | None:
        """Return the C++ kernels if they take this input: fp32 on the CPU."""
        return self.loaded() if x.dtype == torch.float32 and x.is_cpu else None

    def on_cpu(self, weights: Sequence[FusedW]) -> bool:
        """Return whether weights are where the C++ kernels read them."""
        return all(part.is_cpu for weight in weights for part in weight if isinstance(part, Tensor))

    def reference_forward(self, x: Tensor, weights: Sequence[FusedW], activation: str, norm: Norm | None) -> Tensor:
        """Compute one layer, or (gate,) up and down; with a norm, that of the sum of x and the output."""
        out = reference.forward(x, weights, activation, self.matmul)
        return out if norm is None else reference.normalize(out, x, norm)

    def native_forward(self, native: NativeOps, x: Tensor, described: Described, activation: str) -> Tensor:
        """Compute the same in C++."""
        if len(described.structures) == 1:
            return native.linear(x, described, activation)
        return native.ffn(x, described, activation)

    def reference_attention(
        self, x: Tensor, weights: Sequence[FusedW], norm: Norm | None, mask: Tensor | None, heads: int, scale: float
    ) -> Tensor:
        """Compute all heads; with a second weight and a norm, the output layer and the norm of the sum with x."""
        out = reference.attention(reference.forward(x, weights[:1], "none", self.matmul), heads, mask, scale)
        if norm is None:
            return out
        return reference.normalize(reference.forward(out, weights[1:], "none", self.matmul), x, norm)

    def native_attention(
        self,
        native: NativeOps,
        x: Tensor,
        described: Described,
        norm: Norm | None,
        mask: Tensor | None,
        heads: int,
        scale: float,
    ) -> Tensor:
        """Compute the same in C++, where it takes these lengths; else its matmuls alone."""
        batch, length = x.shape[:2]
        if described.out_features[0] and self.fuses_heads(batch, length, described.structures[0].rows):
            return native.attention(x, described, additive(mask, x), heads, scale)
        out = reference.attention(native.linear(x, described, "none"), heads, mask, scale)
        if norm is None:
            return out
        output = described._replace(structures=described.structures[1:], out_features=described.out_features[1:])
        return reference.normalize(native.linear(out, output, "none"), x, norm)
