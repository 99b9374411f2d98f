"""Convolutions: a row for each filter; the columns are its input channels, each with all positions of the kernel."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .base import LayerKind, register_layer_kind
from .view import MatrixView


class Convolution(LayerKind):
    """A weight `(filters, channels / groups, *kernel)`."""

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        shape = self.shape(module, attribute)
        return MatrixView(shape, tuple(range(len(shape))), 1, math.prod(shape[2:]))

    def resize(self, module: Any, outputs: int, inputs: int) -> None:
        module.out_channels, module.in_channels = outputs, inputs

    def not_observable(self, module: Any) -> str | None:
        if module.groups == 1:
            return None
        return "it is a grouped convolution, whose filters read different channels"

    def input_rows(self, module: Any, inputs: Tensor) -> Tensor:
        """Return the patches that the filters are multiplied with (im2col).

        Shapes: `(batch, channels, *size)` -> `(batch, *places, channels x kernel)`

        Example:
            >>> import torch
            >>> layer, x = nn.Conv1d(2, 3, 2, bias=False), torch.randn(1, 2, 5)
            >>> rows = Convolution().input_rows(layer, x)
            >>> bool(torch.allclose(rows @ layer.weight.flatten(1).t(), layer(x).transpose(1, 2), atol=1e-6))
            True
        """
        kernel = module.kernel_size
        if inputs.ndim == len(kernel) + 1:  # a single example
            inputs = inputs[None]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        pieces = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        for axis, (size, stride, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True)):
            pieces = pieces.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        places = pieces.movedim(1, len(kernel) + 1)
        return places.reshape(*places.shape[: len(kernel) + 1], -1)


class TransposedConvolution(LayerKind):
    """A weight `(channels, filters / groups, *kernel)`: a row for each output channel."""

    def view(self, module: Any, attribute: str) -> MatrixView:
        shape, groups = self.shape(module, attribute), module.groups
        split = (groups, shape[0] // groups, *shape[1:])
        order = (0, 2, 1, *range(3, len(split)))
        return MatrixView(shape, order, 2, math.prod(shape[2:]), split)

    def not_observable(self, module: nn.Module) -> str | None:
        return "it is a transposed convolution, whose outputs do not each read one patch of the input"


register_layer_kind(Convolution(), nn.Conv1d, nn.Conv2d, nn.Conv3d)
register_layer_kind(TransposedConvolution(), nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
