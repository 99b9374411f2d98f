"""What a compression is: a rule that gives the layers of a group another form, in place of a weight or beside it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ...config.module_names import matches
from ...config.sparsity import COMPRESSIONS, GroupConfig
from ...errors import RecipeError
from ...modeling.layer_kinds import MatrixLayer, is_linear
from ...modeling.layer_matching import match_layers
from ...modeling.ownership import count_owners, names_of
from ..patterns import Pattern, Structure
from .saved_forms import forms_of

logger = logging.getLogger(__name__)


class Compression:
    """Base of all compressions; their options are fields.

    Attributes:
        form: name of the form that it gives to layers whose weight it replaces.
        fits_inputs: whether it can look at the inputs of layers on calibration data, in one shot.
        needs_inputs: whether it cannot do without.
        goes_beside: whether it can go beside a sparse weight.
    """

    name: ClassVar[str]
    form: ClassVar[str]
    fits_inputs: ClassVar[bool] = False
    needs_inputs: bool = False
    goes_beside: ClassVar[bool] = False

    def check(self, layer: nn.Module, name: str) -> None:
        """Raise `RecipeError` if a layer cannot have this form."""
        if not (is_linear(layer) or isinstance(layer, nn.Embedding)):
            raise RecipeError(
                f"'{name}' is a {type(layer).__name__}, and compression '{self.name}' is for linear layers and "
                "embeddings; exclude it"
            )

    def check_beside(self, layer: nn.Module, name: str) -> None:
        """Raise `RecipeError` if a layer cannot have this form beside a sparse weight."""

    def replace(self, model: nn.Module, name: str, layer: nn.Module) -> None:
        """Put the form in the place of a layer, and of those it is tied to; where no inputs are needed."""
        raise NotImplementedError

    def replace_fitted(self, model: nn.Module, name: str, layer: MatrixLayer, products: Tensor) -> Tensor:
        """Put the form in the place of a layer, fitted to its inputs, and return the matrix that it computes now.

        Args:
            products: `2/n sum x xᵀ` of the inputs, `(in, in)`. Of an embedding, whose inputs are tokens: how often each
                occurs, `(tokens,)`.
        """
        raise NotImplementedError

    def add_fitted(self, layer: MatrixLayer, removed: Tensor, products: Tensor) -> Tensor:
        """Put the form beside a sparse weight, and return the matrix that it adds.

        Args:
            removed: the dense weight minus the sparse one, `(out, in)`.
            products: as in `replace_fitted`.
        """
        raise NotImplementedError


@dataclasses.dataclass
class FormGroup:
    """One group of the config whose layers get another form and no sparse weight, bound to a model.

    Attributes:
        layers: that do not have the form yet, by name.
    """

    config: GroupConfig
    compression: Compression
    layers: dict[str, MatrixLayer]

    def check_renewable(self) -> None:
        """Raise `RecipeError` if the form is fitted to data, which training does not do."""
        if self.compression.needs_inputs and self.layers:
            raise RecipeError(
                f"compression '{self.compression.name}' is fitted to the inputs of layers, in one shot. Call "
                "hf_sparse.sparsify(model, config, batches) before; training starts from there"
            )

    def replace(self, model: nn.Module) -> None:
        """Give the layers their form, unless it was fitted to data before; a second call does nothing."""
        if self.compression.needs_inputs:
            return
        left = {name: layer for name, layer in self.layers.items() if model.get_submodule(name) is layer}
        before = sum(layer.weight.numel() for layer in left.values())
        for name, layer in left.items():
            self.compression.replace(model, name, layer)
        if left:
            logger.info("%s: %d layers with %s weights", self.compression.name, len(left), f"{before:,}")
        self.layers = {}


def bind_forms(model: nn.Module, groups: Sequence[GroupConfig]) -> list[FormGroup]:
    """Bind the groups that put another form in the place of weights; layers that have it already are left alone.

    Raises:
        RecipeError: if a target matches nothing, or a layer cannot have the form.
    """
    return [_bind(model, group) for group in groups if not group.prunes]


def _bind(model: nn.Module, config: GroupConfig) -> FormGroup:
    assert config.compress is not None
    compression: Compression = COMPRESSIONS.build(config.compress)
    done = [name for name, form in forms_of(model).layers.items() if form.form == compression.form]
    targets = config.target_names
    if done and (targets is None or any(matches(name, target) for name in done for target in targets)):
        try:
            layers = match_layers(model, targets, config.exclude_names)
        except RecipeError:
            layers = {}
    else:
        layers = match_layers(model, targets, config.exclude_names)
    owners = count_owners(model)
    for name, layer in layers.items():
        compression.check(layer, name)
        if owners[id(layer._parameters.get("weight"))] > 1:
            _check_tied(model, name, layer, compression)
    return FormGroup(config, compression, layers)


def _check_tied(model: nn.Module, name: str, layer: MatrixLayer, compression: Compression) -> None:
    """Raise `RecipeError` unless all layers that share a weight can have the form: they share its parts then."""
    for other in names_of(model, layer.weight):
        path, _, attribute = other.rpartition(".")
        if attribute != "weight":
            raise RecipeError(f"'{name}' is tied to '{other}', which cannot be {compression.name}; exclude it")
        compression.check(model.get_submodule(path), path)


def bind_beside(config: GroupConfig, pattern: Pattern, layers: Mapping[str, MatrixLayer]) -> Compression | None:
    """Return the compression that goes beside sparse weights, if there is one.

    Raises:
        RecipeError: if it cannot go beside any, or not beside these.
    """
    if config.compress is None:
        return None
    compression: Compression = COMPRESSIONS.build(config.compress)
    if not compression.goes_beside:
        raise RecipeError(
            f"compression '{compression.name}' takes the place of the weight, so there is none to make sparse: leave "
            f"`sparsity` out, got {config.sparsity}"
        )
    if isinstance(pattern, Structure):
        raise RecipeError(
            f"compression '{compression.name}' would compute for a removed {pattern} what it did, so nothing could be "
            "compacted. Use pattern element, n:m or block, or leave `compress` out"
        )
    for name, layer in layers.items():
        compression.check(layer, name)
        compression.check_beside(layer, name)
    return compression
