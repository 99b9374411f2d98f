"""The operators `hf_sparse::sparse_linear`, `sparse_ffn`, `sparse_gated_ffn` and `sparse_attention`, for inference.

They have no backward: an input that needs a gradient is refused, since a gradient that is silently missing trains a
wrong model. Inputs may have any leading shape. A zero weight contributes nothing even where the input is infinite or
NaN (the dense product would give NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BackendError
from . import fallback
from .library import ACTIVATIONS, library
from .packing import PackedWeight, check_layout

_WEIGHT = "Tensor {0}values, Tensor {0}columns, Tensor {0}pointers, Tensor? {0}bias"
_library = torch.library.Library("hf_sparse", "DEF")
_library.define(
    f"sparse_linear(Tensor x, {_WEIGHT.format('')}, int rows, int out_features, int in_features, "
    'str activation="none") -> Tensor'
)
_library.define(
    f"sparse_ffn(Tensor x, {_WEIGHT.format('up_')}, {_WEIGHT.format('down_')}, int up_rows, int down_rows, "
    'int hidden_features, int out_features, int in_features, str activation="none") -> Tensor'
)
_library.define(
    f"sparse_gated_ffn(Tensor x, {_WEIGHT.format('gate_')}, {_WEIGHT.format('up_')}, {_WEIGHT.format('down_')}, "
    "int gate_rows, int up_rows, int down_rows, int hidden_features, int out_features, int in_features, "
    'str activation="none") -> Tensor'
)
_library.define(
    f"sparse_attention(Tensor x, {_WEIGHT.format('')}, Tensor? mask, int rows, int out_features, int in_features, "
    "int heads, float scale) -> Tensor"
)

SHORTEST = 16
"""Tokens from which the own attention is used: it works on tiles of as many."""


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
    size = qkv.out_features // (3 * max(heads, 1))
    return torch.ops.hf_sparse.sparse_attention(
        x,
        *(qkv.values, qkv.columns, qkv.pointers, bias, mask, qkv.rows, qkv.out_features, qkv.in_features, heads),
        max(size, 1) ** -0.5 if scale is None else scale,
    )


Weight = tuple[Tensor, Tensor, Tensor, Tensor | None, int, int, int]
"""values, columns, pointers, bias, rows, out_features, in_features."""


def _check(x: Tensor, activation: str, *weights: Weight) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise BackendError(
            "the sparse products have no backward, and their input needs a gradient: call the model under "
            "torch.inference_mode() or torch.no_grad(), or bring it back with hf_sparse.to_dense_runtime to train it"
        )
    if activation not in ACTIVATIONS:
        raise BackendError(f"unknown activation {activation!r}; the sparse products know {', '.join(ACTIVATIONS)}")
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != weights[0][6]:
        raise BackendError(
            f"a sparse product of {weights[0][6]} inputs was called with {tuple(x.shape)} in {x.dtype}; "
            "the last dimension has to be the inputs, in floating point"
        )
    for values, columns, pointers, bias, rows, out_features, in_features in weights:
        check_layout(values, columns, pointers, rows, out_features, in_features, "the weight of a sparse product")
        if bias is not None and (bias.shape != (out_features,) or not bias.is_floating_point()):
            raise BackendError(f"a bias {tuple(bias.shape)} in {bias.dtype} for {out_features} outputs")


def _native(x: Tensor, *weights: Weight) -> bool:
    """Say whether the C++ kernels take these: fp32 on the CPU, sizes that their int32 holds."""
    return x.dtype == torch.float32 and all(
        part.is_cpu for part in (x, *(part for weight in weights for part in weight[:4] if part is not None))
    )


def _linear(x, values, columns, pointers, bias, rows, out_features, in_features, activation="none"):  # type: ignore[no-untyped-def]
    weight = (values, columns, pointers, bias, rows, out_features, in_features)
    _check(x, activation, weight)
    native = library() if _native(x, weight) else None
    return native.linear(x, weight, activation) if native else fallback.linear(x, weight, activation)


def _linear_fake(x, values, columns, pointers, bias, rows, out_features, in_features, activation="none"):  # type: ignore[no-untyped-def]
    _check(x, activation, (values, columns, pointers, bias, rows, out_features, in_features))
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
    _check(x, activation, *weights)
    native = library() if _native(x, *weights) else None
    return native.ffn(x, weights, activation) if native else fallback.ffn(x, weights, activation)


def _ffn_fake(x, *arguments):  # type: ignore[no-untyped-def]
    parts, activation = _split(arguments)
    weights = _ffn_weights(parts)
    _check(x, activation, *weights)
    return x.new_empty((*x.shape[:-1], weights[-1][5]))


def _check_attention(x: Tensor, weight: Weight, mask: Tensor | None, heads: int) -> None:
    _check(x, "none", weight)
    if x.dim() != 3:
        raise BackendError(f"sparse attention takes x of shape (batch, length, in), not {tuple(x.shape)}")
    if heads < 1 or weight[5] % (3 * heads):
        raise BackendError(f"{weight[5]} outputs are no queries, keys and values of {heads} heads")
    if mask is None:
        return
    batch, length = x.shape[:2]
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    fits = fits and mask.shape[2] in (1, length) and mask.shape[3] == length
    if not fits or not (mask.dtype == torch.bool or mask.dtype == x.dtype):
        raise BackendError(
            f"a mask of shape {tuple(mask.shape)} in {mask.dtype} for an input of shape {tuple(x.shape)}: it has to be "
            f"(1 or batch, 1, 1 or length, length), in bool or {x.dtype}"
        )


def _attention(x, values, columns, pointers, bias, mask, rows, out_features, in_features, heads, scale):  # type: ignore[no-untyped-def]
    weight = (values, columns, pointers, bias, rows, out_features, in_features)
    _check_attention(x, weight, mask, heads)
    native = library() if _native(x, weight) and (mask is None or mask.is_cpu) else None
    length = x.shape[1]
    if native is None or length < SHORTEST:
        product = native.linear(x, weight, "none") if native else fallback.linear(x, weight, "none")
        return fallback.attention(product, heads, mask, scale)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask.logical_not(), -torch.inf)
        mask = mask[:, 0].expand(-1, length, -1)
    return native.attention(x, weight, mask, heads, scale)


def _attention_fake(x, values, columns, pointers, bias, mask, rows, out_features, in_features, heads, scale):  # type: ignore[no-untyped-def]
    _check_attention(x, (values, columns, pointers, bias, rows, out_features, in_features), mask, heads)
    return x.new_empty((*x.shape[:-1], out_features // 3))


library()  # now: a process that forks later is then known to have done so

for _name, _run, _fake in (
    ("sparse_linear", _linear, _linear_fake),
    ("sparse_ffn", _ffn, _ffn_fake),
    ("sparse_gated_ffn", _ffn, _ffn_fake),
    ("sparse_attention", _attention, _attention_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_sparse::{_name}", _fake, lib=_library)
