"""The operators `hf_sparse::int8_attention`, `int8_attention_norm` and `int8_ffn_norm`: whole sub-blocks in int8.

They are `sparse_attention`, `sparse_attention_norm` and `sparse_ffn_norm` with weights in int8, and round what their
products are given, as the products of int8.py do: the input, what the heads make of it, the hidden features. Queries,
keys, values, scores and the layer norm are in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import int8_ops as int8
from . import reference as fallback
from .int8_layout import PackedInt8
from .int8_ops import PARTS, Weight, check_weights, checked, compute, structure
from .library import norm_structure
from .types import Norm
from .validation import NORM, SHORTEST, added, as_given, check_heads, check_norm, scale_of

MANY, SHORT = 3, 20
"""So many sequences of less than so many tokens are faster in the products alone, where they share tiles."""

_library = torch.library.Library("hf_sparse", "FRAGMENT")
_library.define(
    f"int8_attention(Tensor x, {PARTS.format('')}, Tensor? mask, int rows, int out_features, int in_features, "
    "int heads, float scale) -> Tensor"
)
_library.define(
    f"int8_attention_norm(Tensor x, {PARTS.format('')}, {PARTS.format('output_')}, {NORM}, Tensor? mask, "
    "int rows, int output_rows, int inner_features, int features, int heads, float scale) -> Tensor"
)
_library.define(
    f"int8_ffn_norm(Tensor x, {PARTS.format('up_')}, {PARTS.format('down_')}, {NORM}, int up_rows, int down_rows, "
    "int hidden_features, int features, str activation) -> Tensor"
)


def int8_attention(
    x: Tensor,
    qkv: PackedInt8,
    bias: Tensor | None,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the self-attention of every head, as `ops.attention`; the input and the weight in int8.

    Shapes:
        x: (batch, length, in). mask: broadcast to (batch, 1, length, length). Result: (batch, length, out / 3).

    Raises:
        BackendError: as `ops.attention`.

    Example:
        >>> from hf_sparse.kernels import pack_int8
        >>> x = torch.tensor([[[127.0, 1.0]]])
        >>> int8_attention(x, pack_int8(torch.eye(2).repeat(3, 1)), None, heads=1)  # one token: its own value
        tensor([[[127.,   1.]]])
    """
    out: Tensor = torch.ops.hf_sparse.int8_attention(
        *(x, *qkv.parts, bias, mask, qkv.rows, qkv.out_features, qkv.in_features, heads),
        scale_of(scale, qkv.out_features // 3, heads),
    )
    return out


def int8_attention_norm(
    x: Tensor,
    qkv: PackedInt8,
    bias: Tensor | None,
    output: PackedInt8,
    output_bias: Tensor | None,
    norm: Norm,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `layer_norm(x + int8_attention(x, ...) @ output.T + output_bias)`, the attention sub-block of BERT.

    Shapes:
        x: (batch, length, in). output: (in, inner), where qkv is (3 * inner, in). Result: (batch, length, in).

    Raises:
        BackendError: as `ops.attention_norm`.
    """
    out: Tensor = torch.ops.hf_sparse.int8_attention_norm(
        *(x, *qkv.parts, bias, *output.parts, output_bias, *norm, mask),
        *(qkv.rows, output.rows, output.in_features, qkv.in_features, heads),
        scale_of(scale, output.in_features, heads),
    )
    return out


def int8_ffn_norm(
    x: Tensor,
    up: PackedInt8,
    up_bias: Tensor | None,
    down: PackedInt8,
    down_bias: Tensor | None,
    norm: Norm,
    activation: str = "gelu",
) -> Tensor:
    """Compute `layer_norm(x + activation(x @ up.T + up_bias) @ down.T + down_bias)`: BERT's feed-forward sub-block.

    Shapes:
        x: (..., in). up: (hidden, in). down: (in, hidden). Weight and bias of the norm: (in,). Result: (..., in).

    Raises:
        BackendError: as `ops.ffn_norm`.
    """
    out: Tensor = torch.ops.hf_sparse.int8_ffn_norm(
        *(x, *up.parts, up_bias, *down.parts, down_bias, *norm),
        *(up.rows, down.rows, up.out_features, up.in_features, activation),
    )
    return out


def _attention_parts(x: Tensor, parts: tuple) -> tuple[Weight, Tensor | None, int, float]:
    """Check and sort the arguments of `int8_attention`."""
    mask, *sizes, heads, scale = parts[6:]
    weight: Weight = (*parts[:6], *sizes)
    check_weights(x, "none", [weight])
    check_heads(x, weight[-2], mask, heads)
    return weight, mask, heads, scale


def _attention_norm_parts(x: Tensor, parts: tuple) -> tuple[Weight, Tensor | None, int, float, Weight, Norm]:
    """Check and sort the arguments of `int8_attention_norm`."""
    mask, rows, output_rows, inner, features, heads, scale = parts[15:]
    weight: Weight = (*parts[:6], rows, 3 * inner, features)
    output: Weight = (*parts[6:12], output_rows, features, inner)
    check_weights(x, "none", [weight, output])
    check_heads(x, weight[-2], mask, heads)
    check_norm(x, parts[12:15])
    return weight, mask, heads, scale, output, parts[12:15]


def _ffn_norm_parts(x: Tensor, parts: tuple) -> tuple[list[Weight], str, Norm]:
    """Check and sort the arguments of `int8_ffn_norm`."""
    up_rows, down_rows, hidden, features, activation = parts[15:]
    weights: list[Weight] = [
        (*parts[:6], up_rows, hidden, features),
        (*parts[6:12], down_rows, features, hidden),
    ]
    check_weights(x, activation, weights)
    check_norm(x, parts[12:15])
    return weights, activation, parts[12:15]


def _heads(x: Tensor, weight: Weight, mask: Tensor | None, heads: int, scale: float, *after: Any) -> Tensor:
    """Compute the heads, and what comes after them: nothing, or the output weight and the norm."""
    output, norm = after or (None, None)
    own = int8.native_for(x, [weight] if output is None else [weight, output])
    least = SHORT if x.shape[0] >= MANY else SHORTEST
    if own is None or x.shape[1] < least or weight[-2] == 0 or not (mask is None or mask.is_cpu):
        made = fallback.attention(compute(x, [weight], "none"), heads, mask, scale)
        return made if output is None else fallback.normalise(compute(made, [output], "none"), x, norm)
    x, mask = x.contiguous(), added(mask, x)
    mask = None if mask is None else mask.contiguous()
    batch, length, _ = x.shape
    y = x.new_empty((batch, length, weight[-2] // 3 if output is None else output[-2]))
    first, after_it = structure(weight), (None, None) if output is None else structure(output)
    normed = norm_structure(norm)
    step = length * length if mask is not None and mask.shape[0] > 1 else 0
    result = own.hf_sparse_int8_attention(
        *(first[0], after_it[0], normed[0], x.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr()),
        *(step, batch, length, heads, scale, torch.get_num_threads()),
    )
    return checked(result, y)


def _attention(x, *parts):  # type: ignore[no-untyped-def]
    return _heads(x, *_attention_parts(x, parts))


def _attention_fake(x, *parts):  # type: ignore[no-untyped-def]
    weight = _attention_parts(x, parts)[0]
    return x.new_empty((*x.shape[:-1], weight[-2] // 3))


def _attention_norm(x, *parts):  # type: ignore[no-untyped-def]
    return _heads(x, *_attention_norm_parts(x, parts))


def _attention_norm_fake(x, *parts):  # type: ignore[no-untyped-def]
    _attention_norm_parts(x, parts)
    return x.new_empty(x.shape)


def _ffn_norm(x, *parts):  # type: ignore[no-untyped-def]
    return compute(x, *_ffn_norm_parts(x, parts))


def _ffn_norm_fake(x, *parts):  # type: ignore[no-untyped-def]
    _ffn_norm_parts(x, parts)
    return x.new_empty(x.shape)


for _name, _run, _fake in (
    ("int8_attention", _attention, _attention_fake),
    ("int8_attention_norm", _attention_norm, _attention_norm_fake),
    ("int8_ffn_norm", _ffn_norm, _ffn_norm_fake),
):
    _library.impl(_name, as_given(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_sparse::{_name}", _fake, lib=_library)
