"""What an architecture says about a mixture of experts: where the router and the experts are, and what they count."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn


@dataclasses.dataclass(frozen=True)
class Experts:
    """Name the parts of a mixture of experts.

    Args:
        classes: names of the classes of the module.
        key: of the config, with the number of experts of every mixture.
        router: path below the module of the layer with a row of `weight` for each expert.
        experts: path of the module with the parameters of all experts.
        parameters: names of these parameters, whose first dimension is the expert.
        count: attribute of router and experts with the number of experts.
        top_k: attribute of the router with the number of experts of a token.
    """

    classes: frozenset[str]
    key: str
    router: str = "gate"
    experts: str = "experts"
    parameters: tuple[str, ...] = ("gate_up_proj", "down_proj")
    count: str = "num_experts"
    top_k: str = "top_k"

    def find(self, name: str, module: nn.Module) -> ExpertBlock | None:
        """Return the mixture that a module is, or None."""
        if not any(base.__name__ in self.classes for base in type(module).__mro__):
            return None
        try:
            router, experts = module.get_submodule(self.router), module.get_submodule(self.experts)
            held = [router.get_parameter("weight"), *(experts.get_parameter(name) for name in self.parameters)]
        except AttributeError:
            return None
        if len({parameter.shape[0] for parameter in held}) != 1:
            return None
        return ExpertBlock(name, self, module, router, experts)


@dataclasses.dataclass(frozen=True)
class ExpertBlock:
    """A mixture of experts of one model.

    Attributes:
        name: of the module in the model; manifests use it.
        router: its weight has a row for each expert.
        experts: called with the tokens, the experts of each, and their weights.
    """

    name: str
    table: Experts
    module: nn.Module
    router: Any
    experts: Any
    kind: ClassVar[Literal["experts"]] = "experts"

    @property
    def groups(self) -> int:
        """Number of experts that it has now."""
        return int(self.router.weight.shape[0])

    @property
    def top_k(self) -> int:
        """Number of experts that compute each token."""
        return int(getattr(self.router, self.table.top_k))

    @property
    def config_values(self) -> Mapping[str, int]:
        """Keys of the config, and what they would have to be for this many experts."""
        return {self.table.key: self.groups}

    @property
    def layer_names(self) -> list[str]:
        """Full names of the modules that get smaller."""
        return [f"{self.name}.{self.table.router}", f"{self.name}.{self.table.experts}"]
