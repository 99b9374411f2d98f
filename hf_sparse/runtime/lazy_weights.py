"""Lazy weights: they stay in their stored form while a model is loaded, and are decoded one by one when packed.

A lazy weight is a parameter of the right shape that takes no memory: one zero, expanded. So a packed checkpoint is
brought into runtime form without all of its dense weights being in memory together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.model_state import DECODE


def can_be_lazy(owner: nn.Module, name: str, dtype: torch.dtype, device_map: Any) -> bool:
    """Return whether a weight may be lazy: that of a plain linear layer which the runtime can pack, on the CPU.

    Args:
        owner: the module that has it.
        name: of the parameter.
        device_map: of the load.
    """
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
    on_cpu = all(str(device) == "cpu" for device in devices)
    return on_cpu and type(owner) is nn.Linear and name.endswith(".weight") and dtype == torch.float32


def lazy_weight(shape: tuple[int, ...], dtype: torch.dtype, decode: Callable[[], Tensor]) -> nn.Parameter:
    """Return a lazy parameter.

    Args:
        decode: returns the weight; called each time that it is read.
    """
    weight = nn.Parameter(torch.zeros(1, dtype=dtype, device="cpu").expand(shape))
    DECODE.set(weight, decode)
    return weight


def peek(weight: Tensor) -> Tensor:
    """Return the values of a parameter; a lazy one stays lazy."""
    decode: Callable[[], Tensor] | None = DECODE.get(weight)
    return weight.detach() if decode is None else decode()


def materialize(layers: Iterable[nn.Module]) -> None:
    """Decode the weights of these layers that are lazy.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight = lazy_weight((1, 2), torch.float32, lambda: torch.ones(1, 2))
        >>> materialize([layer])
        >>> layer.weight.tolist()
        [[1.0, 1.0]]
    """
    for layer in layers:
        weight = layer._parameters.get("weight")
        if weight is not None and DECODE.get(weight) is not None:
            weight.data = peek(weight)
            DECODE.pop(weight)


def trim_memory() -> None:
    """Return freed memory to the operating system, where the C library can (glibc).

    Packed weights come to lie between dense ones that are freed; without this, more than half of a dense model stays
    with the process.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return None
