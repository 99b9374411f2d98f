"""Parts of a sub-block: which lines of which weight belong to each head or neuron.

A line is an output of a layer that goes into the sub-block (a row of an `nn.Linear`), or an input of the layer that
comes out of it (a column). One layer may hold several parts: query, key and value, or gate and up, as one projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..layer_kinds import MatrixLayer, matrix_shape, output_axis

Layout = Literal["sections", "interleaved"]
"""Of a fused projection: all of query, then all of key, then all of value; or query, key and value of each head."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The lines of one weight that one part of a sub-block has.

    Args:
        name: of the layer in the model.
        layer: the layer.
        axis: dimension of the weight that has the lines.
        count: heads or neurons.
        size: lines of each.
        start: first line of the first.
        stride: lines from the first line of one to the first line of the next.
        shared: whether each of these (a KV head) is read by several heads of the sub-block.
    """

    name: str
    layer: MatrixLayer
    axis: int
    count: int
    size: int
    start: int
    stride: int
    shared: bool = False

    def lines(self, chosen: Sequence[int] | None = None) -> Tensor:
        """Return the lines of each of these heads or neurons; None = all.

        Shapes: `(chosen, size)`

        Example:
            >>> Part("qkv", None, 0, count=2, size=2, start=2, stride=6).lines().tolist()
            [[2, 3], [8, 9]]
        """
        numbers = torch.arange(self.count) if chosen is None else torch.tensor(list(chosen), dtype=torch.long)
        return self.start + numbers[:, None] * self.stride + torch.arange(self.size)

    def weights(self) -> Tensor:
        """Return the weights of each head or neuron.

        Shapes: `(count, size, other side of the weight)`
        """
        weight: Tensor = self.layer.weight.detach()
        lines = weight if self.axis == 0 else weight.t()
        if not self.covers_layer:
            lines = lines.index_select(0, self.lines().flatten().to(weight.device))
        return lines.reshape(self.count, self.size, weight.shape[1 - self.axis])

    def biases(self) -> Tensor | None:
        """Return the biases of each head or neuron of a layer that goes in; None if it has no bias.

        Shapes: `(count, size)`
        """
        if self.layer.bias is None:
            return None
        bias: Tensor = self.layer.bias.detach()
        return bias.index_select(0, self.lines().flatten().to(bias.device)).view(self.count, self.size)

    @property
    def covers_layer(self) -> bool:
        """Whether these are all lines of the layer, in order."""
        whole = self.layer.weight.shape[self.axis] == self.count * self.size
        return whole and self.start == 0 and self.stride == self.size


def exit_part(name: str, layer: MatrixLayer, size: int) -> Part | None:
    """Return the columns of an output layer, in runs of `size`; None if they do not divide into such."""
    inputs = matrix_shape(layer)[1]
    if inputs % size:
        return None
    return Part(name, layer, 1 - output_axis(layer), inputs // size, size, 0, size)


def input_parts(
    layers: Sequence[tuple[str, MatrixLayer]], counts: Sequence[int], size: int, layout: Layout, shared: Sequence[bool]
) -> tuple[Part, ...] | None:
    """Return the parts that several roles (query, key, value; gate, up) have in their layers.

    Args:
        layers: name and layer of each role; one that several roles share holds them in this order.
        counts: heads or neurons of each role.
        size: lines of each head or neuron.
        layout: of a layer that several roles share.
        shared: whether each role is read by several heads.

    Returns:
        None if the layers are not as large as that.
    """
    parts = []
    for index, (name, layer) in enumerate(layers):
        fused = [other for other, (_, each) in enumerate(layers) if each is layer]
        place = fused.index(index)
        if len(fused) > 1 and layout == "interleaved":
            start, stride = place * size, len(fused) * size
        else:
            start, stride = sum(counts[other] for other in fused[:place]) * size, size
        parts.append(Part(name, layer, output_axis(layer), counts[index], size, start, stride, shared[index]))
    for _, layer in layers:
        if matrix_shape(layer)[0] != sum(part.count * part.size for part in parts if part.layer is layer):
            return None
    return tuple(parts)


def remove_lines(layer: MatrixLayer, axis: int, lines: Tensor) -> None:
    """Leave a layer these lines of its weight, in place.

    Args:
        axis: dimension of the weight that has the lines; where it is that of the outputs, the bias has them too.
    """
    layer.weight = taken(layer.weight, lines, axis)
    if axis == output_axis(layer) and layer.bias is not None:
        layer.bias = taken(layer.bias, lines, 0)


def taken(parameter: Tensor, lines: Tensor, axis: int) -> nn.Parameter:
    """Return a new parameter with these lines of a dimension."""
    chosen = parameter.detach().index_select(axis, lines.to(parameter.device))
    # What is empty has nothing to train; DDP would wait for its gradient.
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad and chosen.numel() > 0)
