"""How sparse a model is: per weight and in total, as data and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import SparsityError
from ..modeling.blocks import block_coverage
from ..modeling.forms import FORMS
from ..modeling.integration import integration_of
from ..modeling.layer_matching import NEGLIGIBLE, block_layers
from ..modeling.model_state import SPARSE_WEIGHTS, check_model, sparse_weights
from .masked_weight import MaskedWeight
from .partitions import is_partitioned


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """One weight.

    Attributes:
        name: of the weight.
        shape: as it is now.
        parameters: number of entries.
        nonzeros: entries that are not zero.
        bytes: what it takes in a file, packed as bits and values.
        dense_bytes: what it would take dense, in its own dtype.
        layer: class of the layer that has it, such as "Conv2d".
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    bytes: int
    dense_bytes: int
    layer: str = "Linear"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return (self.parameters - self.nonzeros) / self.parameters if self.parameters else 0.0


@dataclasses.dataclass(frozen=True)
class FormReport:
    """One layer that holds something else than a dense matrix, or something beside it.

    Attributes:
        name: of the layer.
        form: "hashed", "low_rank" or "sparse_low_rank" (beside the weight).
        entries: of the matrix that it multiplies by, or of the one that it adds.
        parameters: values that it holds instead; of low rank beside a weight those of the two thin matrices.
        bytes: of these values.
    """

    name: str
    form: str
    entries: int
    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The targeted weights of a model, with totals over them. `print` it for a table.

    Attributes:
        weights: one report per weight.
        model_parameters: entries of all parameters of the model, targeted or not.
        block_share: fraction of the weights in the transformer blocks that are targeted, in [0, 1].
        forms: one report per layer that is hashed, or has a low rank.
    """

    weights: tuple[WeightReport, ...]
    model_parameters: int
    block_share: float = 1.0
    forms: tuple[FormReport, ...] = ()

    @property
    def parameters(self) -> int:
        """Entries of the targeted weights."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def nonzeros(self) -> int:
        """Entries of the targeted weights that are not zero."""
        return sum(weight.nonzeros for weight in self.weights)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the targeted weights, in [0, 1]."""
        return (self.parameters - self.nonzeros) / self.parameters if self.parameters else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of the targeted weights in a file, packed as bits and values."""
        return sum(weight.bytes for weight in self.weights)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the targeted weights, dense."""
        return sum(weight.dense_bytes for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        totals = {key: getattr(self, key) for key in ("sparsity", "parameters", "nonzeros", "bytes", "dense_bytes")}
        weights = [
            dataclasses.asdict(weight) | {"shape": list(weight.shape), "sparsity": weight.sparsity}
            for weight in self.weights
        ]
        forms = [dataclasses.asdict(form) for form in self.forms]
        return totals | {"model_parameters": self.model_parameters, "weights": weights, "forms": forms}

    def __str__(self) -> str:
        width = max([len(weight.name) for weight in self.weights] + [12])
        head = f"{'weight':<{width}}  {'shape':>14}  {'sparsity':>9}  {'nonzeros':>12}  {'packed':>10}"
        lines = [head, "-" * len(head)]
        for weight in self.weights:
            shape = "x".join(map(str, weight.shape))
            lines.append(_line(weight.name, shape, weight.sparsity, weight.nonzeros, weight.bytes, width))
        lines.append("-" * len(head))
        lines.append(_line("targeted", f"{self.parameters:,}", self.sparsity, self.nonzeros, self.bytes, width))
        lines.append(f"model: {self.model_parameters:,} parameters; targeted weights dense: {_size(self.dense_bytes)}")
        lines += self._others()
        if self.block_share < 1 - NEGLIGIBLE:
            lines.append(f"targeted weights are {self.block_share:.1%} of the weights in the transformer blocks")
        return "\n".join(lines)

    def _others(self) -> list[str]:
        """Return a line for each class of layers but plain linear ones, and for each form."""
        lines = []
        for layer in dict.fromkeys(weight.layer for weight in self.weights if weight.layer != "Linear"):
            of_class = [weight for weight in self.weights if weight.layer == layer]
            own = dataclasses.replace(self, weights=tuple(of_class))
            lines.append(
                f"{layer}: {len(of_class)} weights, {own.parameters:,} parameters, {own.sparsity:.2%} zeros, packed "
                f"{_size(own.bytes)}"
            )
        for form in dict.fromkeys(report.form for report in self.forms):
            reports = [report for report in self.forms if report.form == form]
            values, entries, size = (
                sum(getattr(report, key) for report in reports) for key in ("parameters", "entries", "bytes")
            )
            lines.append(f"{form}: {len(reports)} layers, {values:,} values for {entries:,} entries, {_size(size)}")
        return lines


def _line(name: str, shape: str, sparsity: float, nonzeros: int, size: int, width: int) -> str:
    return f"{name:<{width}}  {shape:>14}  {sparsity:>9.2%}  {nonzeros:>12,}  {_size(size):>10}"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


@torch.no_grad()  # with gradients on, the rows of heads in training are masked by their exit alone
def summarize(model: nn.Module, names: Sequence[str] | None = None) -> Summary:
    """Report the sparsity of a model: being pruned, pruned, or loaded.

    Args:
        model: any module.
        names: names of weights; None = the weights that are meant to be sparse, and for a model that was never
            pruned, the default targets.

    Raises:
        SparsityError: if the model has no weight of a name, or the weight has no values that could be counted: it is on
            the meta device, or quantized to fewer bits than a byte.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", sparsity=0.75))
        >>> summarize(model).sparsity
        0.75
    """
    check_model(model)
    parameters_of = model
    if names is None:
        # A wrapper (DDP, an adapter of PEFT) may hand attributes on, but the names are those inside it.
        outermost = _outermost_marked(model)
        model = outermost[0] if len(outermost) == 1 else model
        names = sparse_weights(model) if outermost else None
    if names is None:
        names = [f"{name}.weight" for name in block_layers(model)]
    modules = dict(model.named_modules())
    reports = []
    for name in names:
        path, _, attribute = name.rpartition(".")
        if path not in modules or not isinstance(getattr(modules[path], attribute, None), torch.Tensor):
            raise SparsityError(f"the model has no weight '{name}'")
        weight = _values(model, modules[path], name)
        parameters, size = weight.numel(), weight.element_size()
        nonzeros = int(torch.count_nonzero(weight))
        packed = min((parameters + 7) // 8 + nonzeros * size, parameters * size)
        reports.append(
            WeightReport(
                name, tuple(weight.shape), parameters, nonzeros, packed, parameters * size, _class_of(modules[path])
            )
        )
    coverage = block_coverage(model, [name.removesuffix(".weight") for name in names])
    total = sum(parameter.numel() for parameter in _own_parameters(parameters_of))
    return Summary(tuple(reports), total, coverage.share, tuple(_forms(model)))


def _class_of(layer: nn.Module) -> str:
    """Return the name of the class of a layer; a linear layer of any class is one."""
    return "Linear" if isinstance(layer, nn.Linear) else type_before_parametrizations(layer).__name__


def _forms(model: nn.Module) -> Iterator[FormReport]:
    """Yield the layers that have a form."""
    for name, module in model.named_modules():
        for form in FORMS.values():
            facts = form.read(module)
            if facts is not None:
                values = form.values(module)
                size = sum(value.numel() * value.element_size() for value in values)
                entries = facts["rows"] * facts["columns"]
                yield FormReport(name, form.name, entries, sum(value.numel() for value in values), size)


def _outermost_marked(model: nn.Module) -> list[nn.Module]:
    """Return the models that were pruned or loaded sparse, without those inside another one."""
    if SPARSE_WEIGHTS.get(model) is not None:
        return [model]
    found = [marked for child in model.children() for marked in _outermost_marked(child)]
    return list(dict.fromkeys(found))


def _values(model: nn.Module, module: nn.Module, name: str) -> Tensor:
    attribute = name.rpartition(".")[2]
    weight: Tensor = getattr(module, attribute).detach()
    if is_partitioned(getattr(module, attribute)):
        raise SparsityError(
            f"'{name}' is partitioned by DeepSpeed ZeRO-3, so its zeros cannot be counted here. Save the model and "
            "load it with from_pretrained; in training, `sparsity` is logged"
        )
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()  # every process has to ask
    if weight.is_meta:
        stored = integration_of(model).read_offloaded(model, name)
        if stored is None:
            raise SparsityError(f"'{name}' is on the meta device and offloaded nowhere, so it has no values to count")
        weight = stored.detach()
    if (
        attribute == "weight"
        and isinstance(module, nn.Linear)
        and weight.shape != (module.out_features, module.in_features)
    ):
        raise SparsityError(
            f"'{name}' is quantized: it holds {tuple(weight.shape)} {weight.dtype} for a weight of "
            f"{(module.out_features, module.in_features)}, whose zeros cannot be counted. Call model.dequantize() first"
        )
    return weight


def _own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the model without the scores that pruning adds while it runs."""
    scores = {id(module.scores) for module in model.modules() if isinstance(module, MaskedWeight)}
    return [parameter for parameter in model.parameters() if id(parameter) not in scores]
