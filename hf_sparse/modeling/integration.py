"""What the library that a model comes from has to do with pruning: one object, looked up by the class of the model.

Pruning knows `nn.Module` alone. A library registers an integration for its base class of models, as `hf` does for
transformers; for all other models the one below does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

from torch import Tensor, nn


class ModelIntegration:
    """Base: nothing to do."""

    def after_attach(self, model: nn.Module, config: Any) -> None:
        """Prepare a model for saving that was given masks.

        Args:
            config: the `SparsityConfig`.
        """

    def after_compact(self, model: nn.Module) -> None:
        """Prepare a model for saving that has lost heads or neurons."""

    def after_keep_zeros(self, model: nn.Module) -> None:
        """Prepare a model for saving whose zeros are kept, and that no pruning here has made sparse."""

    def rebuilt(self, model: nn.Module, changes: Mapping[str, Any]) -> nn.Module | None:
        """Return a model of the same class without values (meta device), with a changed config; None = it has none.

        Args:
            changes: keys of the config and their new values.
        """
        return None

    def without_layers(self, model: nn.Module, kept: Sequence[int], count: int) -> Mapping[str, Any] | None:
        """Return keys of the config and their values for a model with fewer layers; None = it has no config.

        Args:
            kept: numbers of the layers that stay.
            count: how many there are.
        """
        return None

    def change_config(self, model: nn.Module, changes: Mapping[str, Any]) -> None:
        """Change the config of a model that has become another."""

    def retie(self, model: nn.Module) -> None:
        """Let what the library knows of tied weights name the parts of layers that have another form."""

    def read_offloaded(self, model: nn.Module, name: str) -> Tensor | None:
        """Return the values of a weight on the meta device that is stored elsewhere, or None."""
        return None


@singledispatch
def integration_of(model: object) -> ModelIntegration:
    """Return the integration of the library that a model comes from.

    Example:
        >>> class Model(nn.Module): ...
        >>> class Printing(ModelIntegration):
        ...     def after_compact(self, model):
        ...         print("smaller")
        >>> _ = integration_of.register(Model, lambda model: Printing())
        >>> integration_of(Model()).after_compact(Model())
        smaller
    """
    return ModelIntegration()
