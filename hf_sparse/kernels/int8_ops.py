"""The operators `hf_sparse::int8_linear`, `int8_ffn` and `int8_gated_ffn`: sparse weights in int8, for inference.

Inputs are rounded as they come, each token to steps of its largest feature / 127, and so are the hidden features of a
feed-forward part. Sums are exact in int32. A token with an infinity or NaN comes out as NaN.
The C++ needs AVX-512 with VNNI; everything else is computed in plain torch, from the same rounded numbers.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendError
from . import reference as fallback
from .int8_layout import NOTHING, STEPS, PackedInt8, check_int8, dense_int8
from .library import NormStructure, library, library_status, norm_structure
from .types import ACTIVATIONS, Norm
from .validation import as_given, check_gradients, check_input

PARTS = "Tensor {0}values, Tensor {0}columns, Tensor {0}pointers, Tensor {0}scales, Tensor {0}offsets, Tensor? {0}bias"
COUNT = 6
TILE = 64
"""Tokens of a tile in the C++."""

_library = torch.library.Library("hf_sparse", "FRAGMENT")
_library.define(
    f"int8_linear(Tensor x, {PARTS.format('')}, int rows, int out_features, int in_features, str activation) -> Tensor"
)
_library.define(
    f"int8_ffn(Tensor x, {PARTS.format('up_')}, {PARTS.format('down_')}, int up_rows, int down_rows, "
    "int hidden_features, int out_features, int in_features, str activation) -> Tensor"
)
_library.define(
    f"int8_gated_ffn(Tensor x, {PARTS.format('gate_')}, {PARTS.format('up_')}, {PARTS.format('down_')}, "
    "int gate_rows, int up_rows, int down_rows, int hidden_features, int out_features, int in_features, "
    "str activation) -> Tensor"
)


class WeightStructure(ctypes.Structure):
    """`Int8Weight` of csrc/int8.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "columns", "pointers", "scales", "offsets", "bias")),
        ("quads", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("rows", "out_features", "in_features")),
    )


Weight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int, int, int]
"""values, columns, pointers, scales, offsets, bias, rows, out_features, in_features."""


def int8_linear(x: Tensor, weight: PackedInt8, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Compute `activation(x @ weight.T + bias)`, inputs and weight in int8.

    Shapes:
        x: (..., in). bias: (out,). Result: (..., out).

    Raises:
        BackendError: shapes or types that do not fit, an unknown activation, or an input that needs a gradient.

    Example:
        >>> from hf_sparse.kernels import pack_int8
        >>> int8_linear(torch.tensor([[1.0, 0.1]]), pack_int8(torch.tensor([[0.0, 2.0]])))
        tensor([[0.2047]])
    """
    out: Tensor = torch.ops.hf_sparse.int8_linear(
        x, *weight.parts, bias, weight.rows, weight.out_features, weight.in_features, activation
    )
    return out


def why_not_int8() -> str | None:
    """Say why the C++ int8 products cannot run here; None if they can."""
    if native() is not None:
        return None
    status = library_status()
    lacks = "the int8 products need AVX-512 with VNNI, and these do not have it here"
    return f"{status.message}; {lacks}" if status.available else status.message


def native() -> ctypes.CDLL | None:
    """Give the library, or None where it has no int8 products or this processor cannot run them."""
    found = library()
    return _open(found.path) if found is not None and found.isa.startswith("avx512") else None


@cache
def _open(path: str) -> ctypes.CDLL | None:
    made = ctypes.CDLL(path)  # the one that is loaded already
    if not hasattr(made, "hf_sparse_int8_attention") or not made.hf_sparse_int8_runs():
        return None
    pointer, weight = ctypes.c_void_p, ctypes.POINTER(WeightStructure)
    tail = (pointer, pointer, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32)
    made.hf_sparse_int8_linear.argtypes = (weight, *tail)
    norm = ctypes.POINTER(NormStructure)
    made.hf_sparse_int8_ffn.argtypes = (weight, weight, weight, norm, *tail)
    made.hf_sparse_int8_attention.argtypes = [
        *(weight, weight, norm, pointer, pointer, pointer),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_int32),
    ]
    return made


def check_weights(x: Tensor, activation: str, weights: list[Weight]) -> None:
    """Refuse what does not fit; the input has to be one of the first weight."""
    check_input(x, activation, weights[0][-1])
    for *parts, bias, rows, out_features, in_features in weights:
        check_int8(tuple(parts), rows, out_features, in_features)
        check_gradients(bias)
        if bias is not None and (bias.shape != (out_features,) or not bias.is_floating_point()):
            raise BackendError(f"a bias {tuple(bias.shape)} in {bias.dtype} for {out_features} outputs")


def _sorted(arguments: tuple) -> tuple[list[Weight], str]:
    """Sort the arguments of an operator by weight: one; or (gate,) up, down."""
    *parts, activation = arguments
    count = len(parts) // (COUNT + 1)
    tensors = [parts[COUNT * i : COUNT * (i + 1)] for i in range(count)]
    if count == 1:
        return [(*tensors[0], *parts[COUNT:])], activation
    rows, (hidden, out, width) = parts[COUNT * count : -3], parts[-3:]
    shapes = [(hidden, width)] * (count - 1) + [(out, hidden)]
    return [(*tensors[i], rows[i], *shapes[i]) for i in range(count)], activation


def _run(x: Tensor, *arguments) -> Tensor:  # type: ignore[no-untyped-def]
    weights, activation = _sorted(arguments)
    check_weights(x, activation, weights)
    return compute(x, weights, activation)


def compute(x: Tensor, weights: list[Weight], activation: str, norm: Norm | None = None) -> Tensor:
    """Compute one product, or (gate,) up and down; with a norm, that of the sum of x and what comes out."""
    own = native_for(x, weights)
    if own is None:
        out = _plain(x, weights, activation)
        return out if norm is None else fallback.normalise(out, x, norm)
    tokens, threads = x.shape[:-1].numel(), torch.get_num_threads()
    if norm is not None and -(-tokens // TILE) < threads:  # fewer tiles than threads share the products by outputs
        return fallback.normalise(compute(x, weights, activation), x, norm)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], weights[-1][-2]))
    made_of = [structure(weight) for weight in weights]
    made, normed = [part[0] for part in made_of], norm_structure(norm)
    tail = (x.data_ptr(), y.data_ptr(), tokens, ACTIVATIONS.index(activation), threads)
    if len(made) == 1:
        result = own.hf_sparse_int8_linear(made[0], *tail)
    else:
        result = own.hf_sparse_int8_ffn(made[0], made[1] if len(made) == 3 else None, made[-1], normed[0], *tail)
    return checked(result, y)


def native_for(x: Tensor, weights: list[Weight]) -> ctypes.CDLL | None:
    """Give the library if it takes these: fp32 on the CPU."""
    tensors: list[Tensor] = [x, *(part for weight in weights for part in weight[:6] if part is not None)]
    return native() if x.dtype == torch.float32 and all(part.is_cpu for part in tensors) else None


def checked(result: int, y: Tensor) -> Tensor:
    """Give the outputs, or raise what the library has said."""
    if result:
        reason = {1: "its pointers or columns lead outside of it: pack the weight again", 2: "not enough memory"}
        raise BackendError(f"an int8 product failed: {reason.get(result, 'arguments that do not fit together')}")
    return y


def structure(weight: Weight) -> tuple[WeightStructure, Tensor | None]:
    """Give the C structure, and the bias that has to live as long."""
    bias = None if weight[5] is None else weight[5].to(torch.float32).contiguous()
    addresses = [part.data_ptr() for part in weight[:5]]
    at = None if bias is None else bias.data_ptr()
    return WeightStructure(*addresses, at, weight[0].shape[0], *weight[6:]), bias


def _fake(x: Tensor, *arguments) -> Tensor:  # type: ignore[no-untyped-def]
    weights, activation = _sorted(arguments)
    check_weights(x, activation, weights)
    return x.new_empty((*x.shape[:-1], weights[-1][-2]))


def _plain(x: Tensor, weights: list[Weight], activation: str) -> Tensor:
    inner = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if len(weights) == 1:
        return fallback.activate(_product(inner, weights[0]), activation).to(x.dtype)
    hidden = fallback.activate(_product(inner, weights[0]), activation)
    if len(weights) == 3:
        hidden = hidden * _product(inner, weights[1])
    return _product(hidden, weights[-1]).to(x.dtype)


def _product(x: Tensor, weight: Weight) -> Tensor:
    values, columns, pointers, scales, _, bias, rows, out_features, in_features = weight
    matrix = dense_int8(values, columns, pointers, scales, rows, out_features, in_features).to(x.dtype)
    largest = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    nothing = largest < NOTHING
    steps = torch.where(nothing, 0.0, STEPS / largest) * x
    size = torch.where(nothing, 0.0, torch.where(largest.isfinite(), largest / STEPS, torch.nan))
    y = F.linear(steps.round(), matrix) * size
    return y if bias is None else y + bias.to(x.dtype)


for _name in ("int8_linear", "int8_ffn", "int8_gated_ffn"):
    _library.impl(_name, as_given(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_sparse::{_name}", _fake, lib=_library)
