"""Make the sparse operators: schema, fake and dispatcher of each come from `op_table`, for every weight format.

They have no derivative: what needs one is refused, since a gradient that is silently missing trains a wrong model. They
compute in the types of their inputs, under torch.autocast too. A zero weight contributes nothing even where the input
is infinite or NaN (a dense matmul gives NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .functional_transforms import KEY, refuse_derivatives
from .known_weights import KnownWeights
from .op_table import FusedFormat, FusedW, OpSpec, W, WeightFormat
from .types import Norm
from .validation import check_bias, check_heads, check_input, check_no_derivative, check_norm

_library = torch.library.Library("hf_sparse", "DEF")


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
    for spec in form.ops:
        read = _reader(spec, form)
        if spec.has_mask:
            assert isinstance(form, FusedFormat)
            run, fake = _attention_run(spec, form, read), _attention_fake(form, read)
        elif isinstance(form, FusedFormat):
            run, fake = _fused_run(spec, form, read), _forward_fake(form, read)
        else:
            run, fake = _forward_run(form, read), _forward_fake(form, read)
        operators[spec.name] = define(spec.schema(form), run, fake)
    return operators


def without_rows(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what `Kernel.op` calls, of an operator whose weights have no block height."""

    def op(x: Tensor, *arguments: Any) -> Tensor:
        return operator(x, *arguments[:-3], *arguments[-2:])

    return op


class _Places(NamedTuple):
    """Where among the arguments after x, the tensors of the weights, norm, mask and integers begin.

    Attributes:
        end: of the integers that describe the weights.
    """

    norm: int
    mask: int
    rows: int
    end: int


def _places(spec: OpSpec, form: WeightFormat[Any]) -> _Places:
    norm = len(spec.weights) * len(form.tensors)
    mask = norm + 3 * spec.has_norm
    rows = mask + spec.has_mask
    return _Places(norm, mask, rows, rows + len(spec.all_sizes(form)))


def _known_weights(spec: OpSpec, form: FusedFormat[Any]) -> KnownWeights:
    width, (norm, mask, rows, _) = len(form.tensors), _places(spec, form)
    biases = range(width - 1, norm, width)
    tensors = [place for place in range(norm) if place not in biases]

    def constants(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return arguments[norm + 2 : mask] + arguments[rows:]

    return KnownWeights([*tensors, norm, norm + 1] if spec.has_norm else tensors, biases, constants)


def _reader(spec: OpSpec, form: WeightFormat[Any]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what sorts the arguments after x: (weights, norm, activation) or (weights, norm, mask, heads, scale)."""
    count, width = len(spec.weights), len(form.tensors)
    norm_at, mask_at, rows_at, end = _places(spec, form)
    # Not the constructors: at few tokens, each Python call counts.
    make: Callable[[tuple[Any, ...]], Any] = partial(tuple.__new__, form.weight)
    make_norm: Callable[[tuple[Any, ...]], Norm] = partial(tuple.__new__, Norm)
    spans = [(slice(i * width, (i + 1) * width), rows_at + i) for i in range(count)]
    shapes, has_norm, has_mask, default = spec.shapes, spec.has_norm, spec.has_mask, spec.default

    def read(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if shapes is None:
            weights = [make((*arguments[:width], *arguments[rows_at:end]))]
        else:
            each = shapes(*arguments[rows_at + count : end])
            weights = [make((*arguments[s], arguments[r], *e)) for (s, r), e in zip(spans, each, strict=True)]
        norm = make_norm(arguments[norm_at:mask_at]) if has_norm else None
        if has_mask:
            return weights, norm, arguments[mask_at], arguments[end], arguments[end + 1]
        # torch leaves out what is the default of the schema.
        return weights, norm, arguments[end] if len(arguments) > end else default

    return read


def _forward_run(form: WeightFormat[W], read: Callable[..., Any]) -> Callable[..., Tensor]:
    known = form.known

    def run(x: Tensor, *arguments: Any) -> Tensor:
        if (found := known(x, arguments)) is not None:
            return found
        weights, norm, activation = read(arguments)
        _check(form, x, weights, norm, activation)
        return form.matmul(x, weights[0])

    return run


def _forward_fake(form: WeightFormat[W], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, activation = read(arguments)
        _check(form, x, weights, norm, activation)
        return x.new_empty((*x.shape[:-1], weights[-1].out_features))

    return fake


def _fused_run(spec: OpSpec, form: FusedFormat[FusedW], read: Callable[..., Any]) -> Callable[..., Tensor]:
    known, end, default = _known_weights(spec, form), _places(spec, form).end, spec.default

    def run(x: Tensor, *arguments: Any) -> Tensor:
        native = form.native_for(x)
        if native is not None and (described := known.find(arguments)) is not None:
            activation: Any = arguments[end] if len(arguments) > end else default
            check_input(x, activation, described.in_features)
            return form.native_forward(native, x, described, activation)
        seen = known.see(arguments)
        weights, norm, activation = read(arguments)
        _check(form, x, weights, norm, activation)
        if native is None or not form.on_cpu(weights):
            return form.reference_forward(x, weights, activation, norm)
        described = native.describe(weights, norm)
        known.add(arguments, seen, described)
        return form.native_forward(native, x, described, activation)

    return run


def _attention_run(spec: OpSpec, form: FusedFormat[FusedW], read: Callable[..., Any]) -> Callable[..., Tensor]:
    known, (norm_at, mask_at, _, end) = _known_weights(spec, form), _places(spec, form)

    def run(x: Tensor, *arguments: Any) -> Tensor:
        mask = arguments[mask_at]
        native = form.native_for(x) if mask is None or mask.is_cpu else None
        if native is not None and (described := known.find(arguments)) is not None:
            heads, scale = arguments[end : end + 2]
            check_input(x, "none", described.in_features)
            check_heads(x, described.out_features[0], mask, heads)
            norm = Norm(*arguments[norm_at:mask_at]) if spec.has_norm else None
            return form.native_attention(native, x, described, norm, mask, heads, scale)
        seen = known.see(arguments)
        weights, norm, mask, heads, scale = read(arguments)
        _check(form, x, weights, norm, "none")
        check_heads(x, weights[0].out_features, mask, heads)
        if native is None or not form.on_cpu(weights):
            return form.reference_attention(x, weights, norm, mask, heads, scale)
        described = native.describe(weights, norm)
        known.add(arguments, seen, described)
        return form.native_attention(native, x, described, norm, mask, heads, scale)

    return run


def _attention_fake(form: FusedFormat[FusedW], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, mask, heads, _ = read(arguments)
        _check(form, x, weights, norm, "none")
        check_heads(x, weights[0].out_features, mask, heads)
        return x.new_empty((*x.shape[:-1], weights[0].out_features // 3) if norm is None else x.shape)

    return fake


# What depends on the input alone is checked for known weights too, in `_fused_run` and `_attention_run`.
def _check(form: WeightFormat[W], x: Tensor, weights: Sequence[W], norm: Norm | None, activation: str) -> None:
    if (in_features := weights[0].in_features) is not None:
        check_input(x, activation, in_features)
    for weight in weights:
        form.check(weight)
        if weight.bias is not None:
            check_bias(weight.bias, weight.out_features)
    if norm is not None:
        check_norm(x, norm)
