"""The C structures of csrc, made from packed weights, and the types of the arguments of the C functions."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fp32_layout import chunk_width
from .types import Int8Weight, Norm, Weight


class CWeight(ctypes.Structure):
    """`Weight` of csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "columns", "pointers", "bias")),
        ("blocks", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("rows", "out_features", "in_features", "chunk")),
    )


class CInt8Weight(ctypes.Structure):
    """`Int8Weight` of csrc/int8.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "columns", "pointers", "scales", "offsets", "bias")),
        ("quads", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("rows", "out_features", "in_features")),
    )


class CNorm(ctypes.Structure):
    """`Norm` of csrc/kernels.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


CStructure = CWeight | CInt8Weight


class Described(NamedTuple):
    """The weights of a call, as the C functions take them.

    Attributes:
        structures: of the weights.
        in_features, out_features: of the first one; of each.
        norm: of the layer norm.
        kept: tensors that have to live as long, of a call that made them.
    """

    structures: tuple[CStructure, ...]
    in_features: int
    out_features: tuple[int, ...]
    norm: CNorm | None
    kept: tuple[Tensor | None, ...]


def argument_types(structure: type[ctypes.Structure]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the types of the arguments of linear, ffn and attention, after the instruction set."""
    pointer, weight, norm = ctypes.c_void_p, ctypes.POINTER(structure), ctypes.POINTER(CNorm)
    tail = [pointer, pointer, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
    sizes = [ctypes.c_int64] * 3
    return (
        [weight, *tail],
        [weight, weight, weight, norm, *tail],
        [weight, weight, norm, *[pointer] * 3, *sizes, ctypes.c_int32, ctypes.c_float, ctypes.c_int32],
    )


def fp32_structure(weight: Weight) -> CWeight:
    """Return the C structure of a weight in fp32, without its bias."""
    values, columns, pointers, _, rows, out_features, in_features = weight
    return CWeight(
        *(values.data_ptr(), columns.data_ptr(), pointers.data_ptr(), None, columns.numel()),
        *(rows, out_features, in_features, chunk_width(in_features, pointers.shape[0])),
    )


def int8_structure(weight: Int8Weight) -> CInt8Weight:
    """Return the C structure of a weight in int8, without its bias."""
    values, columns, pointers, scales, offsets, _, rows, out_features, in_features = weight
    return CInt8Weight(
        *(values.data_ptr(), columns.data_ptr(), pointers.data_ptr(), scales.data_ptr(), offsets.data_ptr(), None),
        *(values.shape[0], rows, out_features, in_features),
    )


def with_bias(structure: CStructure, bias: Tensor | None) -> tuple[CStructure, Tensor | None]:
    """Return a copy of a structure with a bias, and the tensor that has to live as long.

    A copy, since other threads may read the structure.
    """
    made = type(structure).from_buffer_copy(structure)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    made.bias = None if bias is None else bias.data_ptr()
    return made, bias


def norm_structure(norm: Norm | None) -> tuple[CNorm | None, tuple[Tensor | None, ...]]:
    """Return the C structure of a layer norm, and the tensors that have to live as long."""
    if norm is None:
        return None, ()
    weight, bias, eps = norm
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return CNorm(weight.data_ptr(), None if bias is None else bias.data_ptr(), eps), (weight, bias)
