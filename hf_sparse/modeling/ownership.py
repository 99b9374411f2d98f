"""Which modules hold a parameter: weights that are tied belong to more than one."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn


def count_owners(model: nn.Module) -> Counter[int]:
    """Return how many modules hold each parameter, by the id of the parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> owners = count_owners(model)
        >>> owners[id(model[0].weight)], owners[id(model[1].bias)]
        (2, 1)
    """
    return Counter(id(held) for module in model.modules() for held in module.parameters(recurse=False))


def names_of(model: nn.Module, parameter: Tensor) -> list[str]:
    """Return every name of a parameter, in the order of the model; more than one if it is tied."""
    return [name for name, held in model.named_parameters(remove_duplicate=False) if held is parameter]
