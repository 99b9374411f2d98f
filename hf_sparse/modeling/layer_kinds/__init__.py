"""Layer kinds: the classes of layers with weights that can be pruned, and each weight as a matrix.

Patterns, scorers and codecs see one thing: a matrix with a row for each output and a column for each input. How a class
stores it is in its kind. A new kind is one file here and one import; those of transformers are on the floor `hf`.
"""

from . import convolution, linear  # noqa: F401  each registers its classes
from .base import (
    KeptTokens,
    LayerKind,
    MatrixLayer,
    Slot,
    is_linear,
    is_matrix_layer,
    is_plain,
    kind_of,
    known_kinds,
    matrix_shape,
    oriented,
    output_axis,
    register_layer_kind,
    set_matrix_shape,
    slots_of,
    stored_shape,
)
from .linear import NoInputs, TransposedLinear
from .view import MatrixView

__all__ = [
    "KeptTokens",
    "LayerKind",
    "MatrixLayer",
    "MatrixView",
    "NoInputs",
    "Slot",
    "TransposedLinear",
    "is_linear",
    "is_matrix_layer",
    "is_plain",
    "kind_of",
    "known_kinds",
    "matrix_shape",
    "oriented",
    "output_axis",
    "register_layer_kind",
    "set_matrix_shape",
    "slots_of",
    "stored_shape",
]
