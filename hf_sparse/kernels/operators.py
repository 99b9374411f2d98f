"""Make the sparse operators: schema, fake and dispatcher of each come from `op_table`, for every weight format.

They have no derivative: what needs one is refused, since a gradient that is silently missing trains a wrong model. They
compute in the types of their inputs, under torch.autocast too. A zero weight contributes nothing even where the input
is infinite or NaN (a dense matmul gives NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .functional_transforms import KEY, refuse_derivatives
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
            run, fake = _attention_run(form, read), _attention_fake(form, read)
        else:
            run, fake = _forward_run(form, read), _forward_fake(form, read)
        operators[spec.name] = define(spec.schema(form), run, fake)
    return operators


def without_rows(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what `Kernel.op` calls, of an operator whose weights have no block height."""

    def op(x: Tensor, *arguments: Any) -> Tensor:
        return operator(x, *arguments[:-3], *arguments[-2:])

    return op


def _reader(spec: OpSpec, form: WeightFormat[Any]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what sorts the arguments after x: (weights, norm, activation) or (weights, norm, mask, heads, scale)."""
    count, width = len(spec.weights), len(form.tensors)
    norm_at = count * width
    mask_at = norm_at + 3 * spec.has_norm
    rows_at = mask_at + spec.has_mask
    end = rows_at + len(spec.all_sizes(form))
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
        return form.forward(x, weights, activation, norm)

    return run


def _forward_fake(form: WeightFormat[W], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, activation = read(arguments)
        _check(form, x, weights, norm, activation)
        return x.new_empty((*x.shape[:-1], weights[-1].out_features))

    return fake


def _attention_run(form: FusedFormat[FusedW], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, mask, heads, scale = read(arguments)
        _check(form, x, weights, norm, "none")
        check_heads(x, weights[0].out_features, mask, heads)
        return form.attention(x, weights, norm, mask, heads, scale)

    return run


def _attention_fake(form: FusedFormat[FusedW], read: Callable[..., Any]) -> Callable[..., Tensor]:
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        weights, norm, mask, heads, _ = read(arguments)
        _check(form, x, weights, norm, "none")
        check_heads(x, weights[0].out_features, mask, heads)
        return x.new_empty((*x.shape[:-1], weights[0].out_features // 3) if norm is None else x.shape)

    return fake


def _check(form: WeightFormat[W], x: Tensor, weights: Sequence[W], norm: Norm | None, activation: str) -> None:
    if (in_features := weights[0].in_features) is not None:
        check_input(x, activation, in_features)
    for weight in weights:
        form.check(weight)
        if weight.bias is not None:
            check_bias(weight.bias, weight.out_features)
    if norm is not None:
        check_norm(x, norm)
