"""What an architecture says about convolutions in a row: the filters of one are the input channels of the next.

A filter can leave with its entries of the batch norm behind it and the input channels of the one layer that reads it.
Filters that a residual connection adds to others are in no such row, and stay.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..layer_kinds import Slot, matrix_shape
from ..ownership import count_owners
from .parts import taken

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BY_CHANNEL = {
    *("ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Hardswish", "Hardtanh", "Softplus"),
    *("Sigmoid", "Tanh", "Hardsigmoid", "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"),
    *(f"{kind}Pool{size}d" for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for size in (1, 2, 3)),
}
"""Modules of torch between two convolutions that compute each channel by itself."""


@dataclasses.dataclass(frozen=True)
class FilterBlock:
    """A convolution of one model whose filters can leave.

    Attributes:
        name: of the convolution; recipes and manifests use it.
        module: the convolution.
        norm: name and module of the batch norm behind it, or None.
        output_name: of the layer that reads the filters, a convolution or, behind a flatten, a linear layer.
        output: that layer.
    """

    name: str
    module: Any
    norm: tuple[str, Any] | None
    output_name: str
    output: Any
    kind: ClassVar[Literal["convolution"]] = "convolution"
    config_values: ClassVar[None] = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The convolution, by its name."""
        return {self.name: self.module}

    @property
    def groups(self) -> int:
        """Number of filters that it has now."""
        return int(self.module.out_channels)

    @property
    def size(self) -> int:
        """Input channels, or columns of a linear layer, that read each filter."""
        return int(self.output.weight.shape[1]) // self.groups

    @property
    def layer_names(self) -> list[str]:
        """Full names of the modules that get smaller."""
        return [self.name, self.output_name, *([self.norm[0]] if self.norm is not None else [])]

    def vectors(self) -> Iterator[tuple[Any, str]]:
        """Yield module and attribute of the parameters with one entry for each filter."""
        for module in (self.module, *([self.norm[1]] if self.norm is not None else [])):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 1:
                    yield module, name

    def zero(self, removed: Tensor) -> None:
        """Make filters zero that nothing reads, with their biases and entries of the batch norm.

        Args:
            removed: a flag for each filter.
        """
        filters = Slot(self.module).parameter
        assert filters is not None
        filters.data[removed.to(filters.device)] = 0.0
        for module, name in self.vectors():
            getattr(module, name).data[removed] = 0.0

    def living(self) -> Tensor:
        """Return a flag for each filter: whether the next layer reads it; all of a convolution do not leave."""
        weight = self.output.weight.detach()
        living = (weight != 0).transpose(0, 1).reshape(self.groups, -1).any(1)
        if not bool(living.any()):
            living[0] = True
        return living

    def cut(self, kept: Sequence[int]) -> None:
        """Keep the filters with these numbers, in place."""
        lines, size = torch.tensor(list(kept), dtype=torch.long), self.size
        columns = (lines[:, None] * size + torch.arange(size)).flatten()
        self.output.weight = taken(self.output.weight, columns, 1)
        self.module.weight = taken(self.module.weight, lines, 0)
        for module, name in list(self.vectors()):
            setattr(module, name, taken(getattr(module, name), lines, 0))
        self.module.out_channels = len(lines)
        if isinstance(self.output, nn.Linear):
            self.output.in_features = len(columns)
        else:
            self.output.in_channels = len(columns)
        if self.norm is not None:
            norm = self.norm[1]
            norm.num_features = len(lines)
            for name in ("running_mean", "running_var"):
                if getattr(norm, name) is not None:
                    setattr(norm, name, getattr(norm, name).index_select(0, lines.to(getattr(norm, name).device)))


@dataclasses.dataclass(frozen=True)
class Filters:
    """Name convolutions in a row.

    Args:
        classes: names of the classes of the module.
        layers: paths below it of each convolution and the batch norm behind it; those at the end may be missing. All
            between them computes each channel by itself.
        sequence: path of an `nn.Sequential` with the row, in place of `layers`.
        reader: path of the layer that reads the last one, behind a flatten; None = its filters stay.
    """

    classes: frozenset[str]
    layers: tuple[tuple[str, str], ...] = ()
    sequence: str | None = None
    reader: str | None = None

    def find(self, name: str, module: nn.Module) -> list[FilterBlock]:
        """Return the convolutions of a module whose filters can leave."""
        if not any(base.__name__ in self.classes for base in type(module).__mro__):
            return []
        steps = self._in_sequence(module) if self.sequence is not None else self._named(module)
        found = []
        for (path, convolution, norm), (reader_path, reader, _) in itertools.pairwise(steps):
            block = FilterBlock(
                _join(name, path),
                convolution,
                None if norm is None else (_join(name, norm[0]), norm[1]),
                _join(name, reader_path),
                reader,
            )
            if _fits(block):
                found.append(block)
        return found

    def _named(self, module: nn.Module) -> list[_Step]:
        steps: list[_Step] = []
        for path, norm in self.layers:
            convolution = _at(module, path)
            if convolution is None:
                break
            steps.append((path, convolution, (norm, _at(module, norm))))
        return steps

    def _in_sequence(self, module: nn.Module) -> list[_Step]:
        assert self.sequence is not None
        steps: list[_Step] = []
        for key, child in getattr(_at(module, self.sequence), "_modules", {}).items():
            path = f"{self.sequence}.{key}"
            if isinstance(child, _CONVOLUTIONS):
                steps.append((path, child, None))
            elif isinstance(child, _NORMS) and steps and steps[-1][2] is None:
                steps[-1] = (*steps[-1][:2], (path, child))
            elif type(child).__name__ not in _BY_CHANNEL:
                return []
        reader = None if self.reader is None else _at(module, self.reader)
        return steps if reader is None or self.reader is None else [*steps, (self.reader, reader, None)]


_Step = tuple[str, Any, tuple[str, Any] | None]


def filters_in(model: nn.Module, tables: Sequence[Filters]) -> list[FilterBlock]:
    """Return the convolutions of a model whose filters can leave, in the order of the model.

    Those that share a parameter with another module are left out.
    """
    owners = count_owners(model)
    found = [block for name, module in model.named_modules() for table in tables for block in table.find(name, module)]
    return [
        block
        for block in found
        if all(owners[id(own)] == 1 for layer in (block.module, block.output) for own in layer.parameters())
    ]


def _fits(block: FilterBlock) -> bool:
    """Return whether the layers around a row of filters are of the kinds, and the sizes, that it takes."""
    convolution, reader = block.module, block.output
    if not isinstance(convolution, _CONVOLUTIONS) or convolution.groups != 1:
        return False
    if block.norm is not None:
        norm = block.norm[1]
        if not isinstance(norm, _NORMS) or norm.num_features != block.groups:
            return False
    if isinstance(reader, nn.Linear):
        return block.groups > 0 and matrix_shape(reader)[1] % block.groups == 0
    return isinstance(reader, _CONVOLUTIONS) and reader.groups == 1 and reader.in_channels == block.groups


def _at(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
