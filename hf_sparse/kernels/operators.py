"""One table of the sparse operators. Schema, fake and dispatcher of each are made from it, for every weight format.

They are `hf_sparse::sparse_linear`, `sparse_ffn`, `sparse_gated_ffn`, `sparse_attention`, `sparse_ffn_norm` and
`sparse_attention_norm`, and the same with `int8_`. They have no derivative: what needs one is refused, since a gradient
that is silently missing trains a wrong model. They compute in the types of their inputs, under torch.autocast too.
Inputs may have any leading shape. A zero weight contributes nothing even where the input is infinite or NaN (a dense
matmul gives NaN). Names and the order of the arguments are part of exported programs: they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .functional_transforms import KEY, refuse_derivatives
from .library import NativeOps
from .types import AnyWeight, Norm
from .validation import additive, check_bias, check_heads, check_input, check_no_derivative, check_norm

W = TypeVar("W", bound=AnyWeight)
Shapes = tuple[tuple[int, int], ...]

_library = torch.library.Library("hf_sparse", "DEF")


@dataclass(frozen=True)
class OpSpec:
    """One operator, whatever its weights are stored in.

    Attributes:
        name: without the prefix of the weight format.
        weights: prefix of the arguments of each weight.
        sizes: integers that give the shapes of the weights.
        shapes: sizes -> (out, in) of each weight.
        has_norm: adds the input and computes a layer norm.
        has_mask: an attention, with mask, heads and scale; all others have an activation.
        default: of the activation.
    """

    name: str
    weights: tuple[str, ...]
    sizes: tuple[str, ...]
    shapes: Callable[..., Shapes]
    has_norm: bool = False
    has_mask: bool = False
    default: str | None = None

    def schema(self, form: WeightFormat[Any]) -> str:
        """Return the schema for one weight format."""
        parts = ["Tensor x"]
        for prefix in self.weights:
            parts += [f"Tensor{'?' if name == 'bias' else ''} {prefix}{name}" for name in form.tensors]
        parts += ["Tensor norm_weight, Tensor? norm_bias, float norm_eps"] if self.has_norm else []
        parts += ["Tensor? mask"] if self.has_mask else []
        parts += [f"int {prefix}rows" for prefix in self.weights] + [f"int {size}" for size in self.sizes]
        parts += ["int heads, float scale"] if self.has_mask else ["str activation"]
        return f"{form.prefix}_{self.name}({', '.join(parts)}{_default(self.default)}) -> Tensor"


def _default(value: str | None) -> str:
    return "" if value is None else f'="{value}"'


def _one(out_features: int, in_features: int) -> Shapes:
    return ((out_features, in_features),)


def _ffn(hidden: int, out_features: int, in_features: int) -> Shapes:
    return (hidden, in_features), (out_features, hidden)


def _gated_ffn(hidden: int, out_features: int, in_features: int) -> Shapes:
    return (hidden, in_features), (hidden, in_features), (out_features, hidden)


def _ffn_norm(hidden: int, features: int) -> Shapes:
    return (hidden, features), (features, hidden)


def _attention_norm(inner: int, features: int) -> Shapes:
    return (3 * inner, features), (features, inner)


_LINEAR, _HIDDEN = ("out_features", "in_features"), ("hidden_features", "out_features", "in_features")

OPS = (
    OpSpec("linear", ("",), _LINEAR, _one, default="none"),
    OpSpec("ffn", ("up_", "down_"), _HIDDEN, _ffn),
    OpSpec("gated_ffn", ("gate_", "up_", "down_"), _HIDDEN, _gated_ffn),
    OpSpec("ffn_norm", ("up_", "down_"), ("hidden_features", "features"), _ffn_norm, has_norm=True),
    OpSpec("attention", ("",), _LINEAR, _one, has_mask=True),
    OpSpec(
        *("attention_norm", ("", "output_"), ("inner_features", "features"), _attention_norm),
        has_norm=True,
        has_mask=True,
    ),
)


@dataclass(frozen=True)
class WeightFormat(Generic[W]):
    """How weights are stored, and what computes with them.

    Attributes:
        prefix: of the names of its operators.
        weight: the NamedTuple of a weight: tensors, bias, rows, out_features, in_features.
        check: refuses a weight whose tensors do not fit together, by their shapes alone.
        native: the C++ kernels, if they take an input and these weights; else None.
        matmul: the reference of `x @ weight.T + bias`.
        fuses_norm: (tokens, threads) -> whether C++ computes the layer norm with the feed-forward part.
        fuses_heads: (batch, length, weight) -> whether C++ computes heads, on tiles of each sequence.
    """

    prefix: str
    weight: type[W]
    check: Callable[[W], None]
    native: Callable[[Tensor, Sequence[W]], NativeOps | None]
    matmul: Callable[[Tensor, W], Tensor]
    fuses_norm: Callable[[int, int], bool]
    fuses_heads: Callable[[int, int, W], bool]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of a weight, the bias last."""
        fields = self.weight._fields
        return fields[: fields.index("bias") + 1]

    def forward(self, x: Tensor, weights: Sequence[W], activation: str, norm: Norm | None) -> Tensor:
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
        self, x: Tensor, weights: Sequence[W], norm: Norm | None, mask: Tensor | None, heads: int, scale: float
    ) -> Tensor:
        """Compute all heads; with a second weight and a norm, the output layer and the norm of the sum with x."""
        native = self.native(x, weights) if mask is None or mask.is_cpu else None
        first, batch, length = weights[0], x.shape[0], x.shape[1]
        if native is not None and first.out_features and self.fuses_heads(batch, length, first):
            return native.attention(x, weights, norm, additive(mask, x), heads, scale)
        linear = self.reference_linear if native is None else native.linear
        out = reference.attention(linear(x, first, "none"), heads, mask, scale)
        return out if norm is None else reference.normalize(linear(out, weights[1], "none"), x, norm)

    def reference_linear(self, x: Tensor, weight: W, activation: str) -> Tensor:
        """Compute one layer by the reference."""
        return reference.forward(x, (weight,), activation, self.matmul)


def define(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """Register one operator of the library `hf_sparse`, for inference: see the module.

    Args:
        run: computes it, on any device; autograd sees nothing of it.
        fake: gives an empty output of the right shape, and refuses what `run` refuses.

    Returns:
        The operator.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, _inference_only(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_sparse::{name}", _inference_only(fake), lib=_library)
    operator = getattr(torch.ops.hf_sparse, name)
    _library.impl(name, refuse_derivatives(operator), KEY)
    return operator


def _inference_only(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Refuse what needs a derivative; and compute in the given types, whatever torch.autocast does around it.

    Autocast reaches into the plain torch inside: an attention would come out in bfloat16, for a kernel that reads fp32.
    """

    @wraps(run)
    def inner(x: Tensor, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            check_no_derivative((x, *arguments))
        if x.is_cpu and not torch.is_autocast_enabled("cpu"):  # nearly always, and at each call
            return run(x, *arguments)
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return run(x, *arguments)
        with torch.autocast(kind, enabled=False):
            return run(x, *arguments)

    return inner


def define_all(form: WeightFormat[Any]) -> dict[str, Any]:
    """Register all operators of one weight format, and return them by the name in the table."""
    operators = {}
    for spec in OPS:
        read = _reader(spec, form)
        make_run, make_fake = (_attention_run, _attention_fake) if spec.has_mask else (_forward_run, _forward_fake)
        operators[spec.name] = define(spec.schema(form), make_run(form, read), make_fake(form, read))
    return operators


def _reader(spec: OpSpec, form: WeightFormat[W]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what sorts the arguments after x: (weights, norm, activation) or (weights, norm, mask, heads, scale)."""
    count, width = len(spec.weights), len(form.tensors)
    norm_at = count * width
    mask_at = norm_at + 3 * spec.has_norm
    rows_at = mask_at + spec.has_mask
    sizes_at = rows_at + count
    end = sizes_at + len(spec.sizes)
    # Not the constructors: at few tokens, each Python call counts.
    make: Callable[[tuple[Any, ...]], W] = partial(tuple.__new__, form.weight)
    make_norm: Callable[[tuple[Any, ...]], Norm] = partial(tuple.__new__, Norm)
    spans = [(slice(i * width, (i + 1) * width), rows_at + i) for i in range(count)]
    shapes, has_norm, has_mask, default = spec.shapes, spec.has_norm, spec.has_mask, spec.default

    def read(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if count == 1:
            weights = [make((*arguments[:width], *arguments[rows_at:end]))]
        else:
            each = shapes(*arguments[sizes_at:end])
            weights = [make((*arguments[s], arguments[r], *e)) for (s, r), e in zip(spans, each, strict=True)]
        norm = make_norm(arguments[norm_at:mask_at]) if has_norm else None
        if has_mask:
            return weights, norm, arguments[mask_at], arguments[end], arguments[end + 1]
        # torch leaves out what is the default of the schema.
        return weights, norm, arguments[end] if len(arguments) > end else default

    return read


def _forward_run(form: WeightFormat[W], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, activation = read(arguments)
        _check(form, x, weights, norm, activation)
        return form.forward(x, weights, activation, norm)

    return run


def _forward_fake(form: WeightFormat[W], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, activation = read(arguments)
        _check(form, x, weights, norm, activation)
        return x.new_empty((*x.shape[:-1], weights[-1].out_features))

    return fake


def _attention_run(form: WeightFormat[W], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, mask, heads, scale = read(arguments)
        _check(form, x, weights, norm, "none")
        check_heads(x, weights[0].out_features, mask, heads)
        return form.attention(x, weights, norm, mask, heads, scale)

    return run


def _attention_fake(form: WeightFormat[W], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, mask, heads, _ = read(arguments)
        _check(form, x, weights, norm, "none")
        check_heads(x, weights[0].out_features, mask, heads)
        return x.new_empty((*x.shape[:-1], weights[0].out_features // 3) if norm is None else x.shape)

    return fake


def _check(form: WeightFormat[W], x: Tensor, weights: Sequence[W], norm: Norm | None, activation: str) -> None:
    check_input(x, activation, weights[0].in_features)
    for weight in weights:
        form.check(weight)
        if weight.bias is not None:
            check_bias(weight.bias, weight.out_features)
    if norm is not None:
        check_norm(x, norm)
