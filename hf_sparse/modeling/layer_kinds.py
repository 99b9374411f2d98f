"""Layer kinds: the classes of layers whose weight is one matrix, and which way round each of them stores it.

`nn.Linear` stores `(out, in)`. `Conv1D` of transformers (GPT-2) stores `(in, out)`; the floor `hf` registers it, since
this one knows torch alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from .class_swap import Swapped, swap_class

MatrixLayer: TypeAlias = nn.Linear
"""Static type of a layer of any kind. Only `weight` and `bias` are common to all: sizes come from `matrix_shape`."""


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How a class of layers stores its weight.

    Args:
        transposed: as `(in, out)` instead of `(out, in)`.
    """

    transposed: bool = False


_KINDS: dict[type[nn.Module], LayerKind] = {nn.Linear: LayerKind()}


def register_layer_kind(cls: type[nn.Module], kind: LayerKind) -> None:
    """Let the layers of a class, and of those derived from it, be matched and pruned.

    Args:
        cls: its `weight` is a matrix, its `bias` a vector of outputs or None.
    """
    _KINDS[cls] = kind


def known_kinds() -> str:
    """Return the names of all classes, for a message.

    Example:
        >>> known_kinds().startswith("nn.Linear")
        True
    """
    return " and ".join(("nn." if cls.__module__.startswith("torch.nn") else "") + cls.__name__ for cls in _KINDS)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer, or None."""
    return next((_KINDS[cls] for cls in type(module).__mro__ if cls in _KINDS), None)


def is_matrix_layer(module: object) -> TypeGuard[MatrixLayer]:
    """Return whether a module is a layer whose weight is one matrix.

    Example:
        >>> is_matrix_layer(nn.Linear(2, 3)), is_matrix_layer(nn.LayerNorm(2))
        (True, False)
    """
    return isinstance(module, nn.Module) and kind_of(module) is not None


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a layer stores its weight as `(in, out)`."""
    kind = kind_of(layer)
    return kind is not None and kind.transposed


def stored_shape(layer: MatrixLayer) -> tuple[int, int]:
    """Return the shape of the weight as the layer stores it; also where the values are packed (bitsandbytes)."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape
    return rows, columns


def matrix_shape(layer: MatrixLayer) -> tuple[int, int]:
    """Return outputs and inputs of a layer.

    Example:
        >>> matrix_shape(nn.Linear(2, 3))
        (3, 2)
    """
    shape = stored_shape(layer)
    return shape[::-1] if is_transposed(layer) else shape


def oriented(layer: nn.Module, values: Tensor) -> Tensor:
    """Return a tensor of the shape of a weight as `(out, in)`, a view; and, applied to that, as it is stored."""
    return values.t() if is_transposed(layer) else values


def output_axis(layer: nn.Module) -> int:
    """Return the dimension of the stored weight that has the outputs."""
    return 1 if is_transposed(layer) else 0


def set_matrix_shape(layer: nn.Module, outputs: int, inputs: int) -> None:
    """Let a layer state the sizes that its weight has now; a `Conv1D` without inputs gives its bias."""
    module: Any = layer
    if isinstance(layer, nn.Linear):
        module.out_features, module.in_features = outputs, inputs
        return
    module.nf, module.nx = outputs, inputs  # of `Conv1D`
    if not inputs:
        swap_class(layer, NoInputs)


class NoInputs(Swapped):
    """A `Conv1D` without inputs, which its plain class cannot compute."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Return the bias for each position."""
        return torch.zeros((*x.shape[:-1], self.nf), dtype=x.dtype, device=x.device) + self.bias
