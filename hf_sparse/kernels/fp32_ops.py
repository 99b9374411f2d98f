"""The operators `hf_sparse::sparse_linear`, `sparse_ffn`, `sparse_gated_ffn` and `sparse_attention`, for inference.

`sparse_ffn_norm` and `sparse_attention_norm` are whole sub-blocks of BERT: with the inputs added and the layer norm.

They have no backward: whatever needs a gradient is refused, since a gradient that is silently missing trains a wrong
model. They compute in the types that they are given, under torch.autocast too. Inputs may have any leading shape. A
zero weight contributes nothing even where the input is infinite or NaN (the dense product would give NaN).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference as fallback
from .fp32_layout import PackedWeight
from .library import library
from .types import Norm, Weight
from .validation import (
    NORM,
    SHORTEST,
    added,
    as_given,
    check,
    check_attention,
    check_norm,
    check_weights,
    scale_of,
)

_WEIGHT = "Tensor {0}values, Tensor {0}columns, Tensor {0}pointers, Tensor? {0}bias"
_library = torch.library.Library("hf_sparse", "DEF")
_library.define(
    f"sparse_linear(Tensor x, {_WEIGHT.format('')}, int rows, int out_features, int in_features, "
    'str activation="none") -> Tensor'
)
_library.define(
    f"sparse_ffn(Tensor x, {_WEIGHT.format('up_')}, {_WEIGHT.format('down_')}, int up_rows, int down_rows, "
    "int hidden_features, int out_features, int in_features, str activation) -> Tensor"
)
_library.define(
    f"sparse_gated_ffn(Tensor x, {_WEIGHT.format('gate_')}, {_WEIGHT.format('up_')}, {_WEIGHT.format('down_')}, "
    "int gate_rows, int up_rows, int down_rows, int hidden_features, int out_features, int in_features, "
    "str activation) -> Tensor"
)
_library.define(
    f"sparse_attention(Tensor x, {_WEIGHT.format('')}, Tensor? mask, int rows, int out_features, int in_features, "
    "int heads, float scale) -> Tensor"
)

_library.define(
    f"sparse_ffn_norm(Tensor x, {_WEIGHT.format('up_')}, {_WEIGHT.format('down_')}, {NORM}, int up_rows, "
    "int down_rows, int hidden_features, int features, str activation) -> Tensor"
)
_library.define(
    f"sparse_attention_norm(Tensor x, {_WEIGHT.format('')}, {_WEIGHT.format('output_')}, {NORM}, Tensor? mask, "
    "int rows, int output_rows, int inner_features, int features, int heads, float scale) -> Tensor"
)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Compute `activation(x @ weight.T + bias)`.

    Shapes:
        x: (..., in). bias: (out,). Result: (..., out).

    Raises:
        BackendError: shapes or types that do not fit, an unknown activation, or an input that needs a gradient.
    """
    return torch.ops.hf_sparse.sparse_linear(
        x,
        weight.values,
        weight.columns,
        weight.pointers,
        bias,
        weight.rows,
        weight.out_features,
        weight.in_features,
        activation,
    )


def ffn(
    x: Tensor,
    up: PackedWeight,
    up_bias: Tensor | None,
    down: PackedWeight,
    down_bias: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """Compute `activation(x @ up.T + up_bias) @ down.T + down_bias`, the hidden features never leaving the cache.

    Shapes:
        x: (..., in). up: (hidden, in). down: (out, hidden). Result: (..., out).

    Raises:
        BackendError: as `linear`.
    """
    return torch.ops.hf_sparse.sparse_ffn(
        x,
        *(up.values, up.columns, up.pointers, up_bias),
        *(down.values, down.columns, down.pointers, down_bias),
        *(up.rows, down.rows, up.out_features, down.out_features, up.in_features),
        activation,
    )


def gated_ffn(
    x: Tensor, gate: PackedWeight, up: PackedWeight, down: PackedWeight, activation: str = "gelu_tanh"
) -> Tensor:
    """Compute `(activation(x @ gate.T) * (x @ up.T)) @ down.T`, as gated T5 does.

    Shapes:
        x: (..., in). gate, up: (hidden, in). down: (out, hidden). Result: (..., out).

    Raises:
        BackendError: as `linear`.
    """
    return torch.ops.hf_sparse.sparse_gated_ffn(
        x,
        *(gate.values, gate.columns, gate.pointers, None),
        *(up.values, up.columns, up.pointers, None),
        *(down.values, down.columns, down.pointers, None),
        *(gate.rows, up.rows, down.rows, up.out_features, down.out_features, up.in_features),
        activation,
    )


def attention(
    x: Tensor,
    qkv: PackedWeight,
    bias: Tensor | None,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the self-attention of every head: `softmax(scale * q k^T + mask) v`, `q, k, v = x @ qkv.T + bias`.

    A query that may see no key gets zeros, as in torch.

    Args:
        qkv: the weights of queries, keys and values above each other.
        mask: bool, True = may be seen, or floats that are added to the scores.
        scale: one over the root of the size of a head by default.

    Shapes:
        x: (batch, length, in). mask: broadcast to (batch, 1, length, length). Result: (batch, length, out / 3).

    Raises:
        BackendError: as `linear`; or heads that do not divide the outputs, or a mask of another shape or type.
    """
    return torch.ops.hf_sparse.sparse_attention(
        x,
        *(qkv.values, qkv.columns, qkv.pointers, bias, mask, qkv.rows, qkv.out_features, qkv.in_features, heads),
        scale_of(scale, qkv.out_features // 3, heads),
    )


def ffn_norm(
    x: Tensor,
    up: PackedWeight,
    up_bias: Tensor | None,
    down: PackedWeight,
    down_bias: Tensor | None,
    norm: Norm,
    activation: str = "gelu",
) -> Tensor:
    """Compute `layer_norm(x + ffn(x, ...))`, the whole feed-forward sub-block of BERT.

    Shapes:
        x: (..., in). up: (hidden, in). down: (in, hidden). Weight and bias of the norm: (in,). Result: (..., in).

    Raises:
        BackendError: as `linear`; or a norm of another size or type.
    """
    return torch.ops.hf_sparse.sparse_ffn_norm(
        x,
        *(up.values, up.columns, up.pointers, up_bias),
        *(down.values, down.columns, down.pointers, down_bias),
        *(*norm, up.rows, down.rows, up.out_features, up.in_features, activation),
    )


def attention_norm(
    x: Tensor,
    qkv: PackedWeight,
    bias: Tensor | None,
    output: PackedWeight,
    output_bias: Tensor | None,
    norm: Norm,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `layer_norm(x + attention(x, ...) @ output.T + output_bias)`, the whole attention sub-block of BERT.

    Shapes:
        x: (batch, length, in). output: (in, inner), where qkv is (3 * inner, in). Else as `attention`.
        Result: (batch, length, in).

    Raises:
        BackendError: as `attention`; or a norm of another size or type.
    """
    return torch.ops.hf_sparse.sparse_attention_norm(
        x,
        *(qkv.values, qkv.columns, qkv.pointers, bias),
        *(output.values, output.columns, output.pointers, output_bias),
        *(*norm, mask, qkv.rows, output.rows, output.in_features, qkv.in_features, heads),
        scale_of(scale, output.in_features, heads),
    )


def _native(x: Tensor, *weights: Weight) -> bool:
    """Say whether the C++ kernels take these: fp32 on the CPU, sizes that their int32 holds."""
    return x.dtype == torch.float32 and all(
        part.is_cpu for part in (x, *(part for weight in weights for part in weight[:4] if part is not None))
    )


def _linear(x, values, columns, pointers, bias, rows, out_features, in_features, activation="none"):  # type: ignore[no-untyped-def]
    weight = (values, columns, pointers, bias, rows, out_features, in_features)
    check(x, activation, weight)
    native = library() if _native(x, weight) else None
    return native.linear(x, weight, activation) if native else fallback.linear(x, weight, activation)


def _linear_fake(x, values, columns, pointers, bias, rows, out_features, in_features, activation="none"):  # type: ignore[no-untyped-def]
    check(x, activation, (values, columns, pointers, bias, rows, out_features, in_features))
    return x.new_empty((*x.shape[:-1], out_features))


def _ffn_weights(parts: tuple) -> list[Weight]:
    """Sort the arguments of a feed-forward operator by weight: (gate,) up, down."""
    count = 2 if len(parts) == 13 else 3
    rows, (hidden, out_features, in_features) = parts[4 * count : 5 * count], parts[5 * count :]
    shapes = [(hidden, in_features)] * (count - 1) + [(out_features, hidden)]
    return [(*parts[4 * i : 4 * i + 4], rows[i], *shapes[i]) for i in range(count)]


def _split(arguments: tuple) -> tuple[tuple, str]:
    """Take the activation from the end; torch leaves it out where it is the default of the schema."""
    if isinstance(arguments[-1], str):
        return arguments[:-1], arguments[-1]
    return arguments, "none"


def _ffn(x, *arguments):  # type: ignore[no-untyped-def]
    parts, activation = _split(arguments)
    weights = _ffn_weights(parts)
    check(x, activation, *weights)
    native = library() if _native(x, *weights) else None
    return native.ffn(x, weights, activation) if native else fallback.ffn(x, weights, activation)


def _ffn_fake(x, *arguments):  # type: ignore[no-untyped-def]
    parts, activation = _split(arguments)
    weights = _ffn_weights(parts)
    check(x, activation, *weights)
    return x.new_empty((*x.shape[:-1], weights[-1][5]))


def _ffn_norm_parts(parts: tuple) -> tuple[list[Weight], Norm]:
    """Sort the arguments of `sparse_ffn_norm`."""
    up_rows, down_rows, hidden, features = parts[11:]
    return [(*parts[:4], up_rows, hidden, features), (*parts[4:8], down_rows, features, hidden)], parts[8:11]


def _ffn_norm(x, *arguments):  # type: ignore[no-untyped-def]
    parts, activation = _split(arguments)
    weights, norm = _ffn_norm_parts(parts)
    check(x, activation, *weights)
    check_norm(x, norm)
    native = library() if _native(x, *weights) else None
    if native and x.shape[:-1].numel() >= SHORTEST * torch.get_num_threads():
        return native.ffn(x, weights, activation, norm)
    made = native.ffn(x, weights, activation) if native else fallback.ffn(x, weights, activation)
    return fallback.normalise(made, x, norm)


def _ffn_norm_fake(x, *arguments):  # type: ignore[no-untyped-def]
    parts, activation = _split(arguments)
    weights, norm = _ffn_norm_parts(parts)
    check(x, activation, *weights)
    check_norm(x, norm)
    return x.new_empty(x.shape)


def _heads(x: Tensor, weight: Weight, mask: Tensor | None, heads: int, scale: float, *after: Any) -> Tensor:
    """Compute the heads, and what comes after them: nothing, or the output weight and the norm."""
    output, norm = after or (None, None)
    weights = [weight] if output is None else [weight, output]
    native = library() if _native(x, *weights) and (mask is None or mask.is_cpu) else None
    batch, length = x.shape[:2]
    # Several short sequences fill the tiles of one product better than tiles of their own; taller blocks do not mind.
    apart = length < SHORTEST or (batch > 2 and length < 2 * SHORTEST and weight[4] < 4) or weight[5] == 0
    if native is not None and not apart:
        return native.attention(x, weight, added(mask, x), heads, scale, output, norm)
    product = native.linear if native else fallback.linear
    made = fallback.attention(product(x, weight, "none"), heads, mask, scale)
    return made if output is None else fallback.normalise(product(made, output, "none"), x, norm)


def _attention(x, values, columns, pointers, bias, mask, rows, out_features, in_features, heads, scale):  # type: ignore[no-untyped-def]
    weight = (values, columns, pointers, bias, rows, out_features, in_features)
    check_attention(x, weight, mask, heads)
    return _heads(x, weight, mask, heads, scale)


def _attention_fake(x, values, columns, pointers, bias, mask, rows, out_features, in_features, heads, scale):  # type: ignore[no-untyped-def]
    check_attention(x, (values, columns, pointers, bias, rows, out_features, in_features), mask, heads)
    return x.new_empty((*x.shape[:-1], out_features // 3))


def _attention_norm_parts(x: Tensor, parts: tuple) -> tuple[Weight, Tensor | None, int, float, Weight, Norm]:
    """Check and sort the arguments of `sparse_attention_norm`."""
    mask, rows, output_rows, inner, features, heads, scale = parts[11:]
    weight: Weight = (*parts[:4], rows, 3 * inner, features)
    output: Weight = (*parts[4:8], output_rows, features, inner)
    check_attention(x, weight, mask, heads)
    check_weights(output)
    check_norm(x, parts[8:11])
    return weight, mask, heads, scale, output, parts[8:11]


def _attention_norm(x, *parts):  # type: ignore[no-untyped-def]
    return _heads(x, *_attention_norm_parts(x, parts))


def _attention_norm_fake(x, *parts):  # type: ignore[no-untyped-def]
    _attention_norm_parts(x, parts)
    return x.new_empty(x.shape)


library()  # now: a process that forks later is then known to have done so

for _name, _run, _fake in (
    ("sparse_linear", _linear, _linear_fake),
    ("sparse_ffn", _ffn, _ffn_fake),
    ("sparse_gated_ffn", _ffn, _ffn_fake),
    ("sparse_ffn_norm", _ffn_norm, _ffn_norm_fake),
    ("sparse_attention", _attention, _attention_fake),
    ("sparse_attention_norm", _attention_norm, _attention_norm_fake),
):
    _library.impl(_name, as_given(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_sparse::{_name}", _fake, lib=_library)
