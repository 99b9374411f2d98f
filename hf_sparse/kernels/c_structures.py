"""The C structures of csrc, made from packed weights, and the types of the arguments of the C functions."""

from __future__ import annotations

import ctypes
from typing import Any, TypeVar

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


_Structure = TypeVar("_Structure", CWeight, CInt8Weight)
Kept = tuple[_Structure, Tensor | None]
"""A C structure, and the bias that has to live as long."""


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


def fp32_structure(weight: Weight) -> Kept[CWeight]:
    """Return the C structure of a weight in fp32, and its bias."""
    values, columns, pointers, bias, rows, out_features, in_features = weight
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    address = None if bias is None else bias.data_ptr()
    return CWeight(
        *(values.data_ptr(), columns.data_ptr(), pointers.data_ptr(), address, columns.numel()),
        *(rows, out_features, in_features, chunk_width(in_features, pointers.shape[0])),
    ), bias


def int8_structure(weight: Int8Weight) -> Kept[CInt8Weight]:
    """Return the C structure of a weight in int8, and its bias."""
    values, columns, pointers, scales, offsets, bias, rows, out_features, in_features = weight
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    address = None if bias is None else bias.data_ptr()
    return CInt8Weight(
        *(values.data_ptr(), columns.data_ptr(), pointers.data_ptr(), scales.data_ptr(), offsets.data_ptr(), address),
        *(values.shape[0], rows, out_features, in_features),
    ), bias


def norm_structure(norm: Norm | None) -> tuple[CNorm | None, tuple[Tensor | None, ...]]:
    """Return the C structure, and the tensors that have to live as long."""
    if norm is None:
        return None, ()
    weight, bias, eps = norm
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return CNorm(weight.data_ptr(), None if bias is None else bias.data_ptr(), eps), (weight, bias)
