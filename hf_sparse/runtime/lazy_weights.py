"""Weights that wait in their stored form while a model is loaded, and are decoded one by one when they are packed.

A waiting weight is a parameter of the right shape that takes no memory: one zero, seen as many. So a packed checkpoint
comes into runtime form without its dense weights ever being in memory together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.model_state import DECODE


def can_wait(owner: nn.Module, name: str, dtype: torch.dtype, device_map: Any) -> bool:
    """Return whether a weight may wait: that of a plain linear layer which the runtime can pack, on the CPU.

    Args:
        owner: the module that has it.
        name: of the parameter.
        device_map: of the load.
    """
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
    here = all(str(device) == "cpu" for device in devices)
    return here and type(owner) is nn.Linear and name.endswith(".weight") and dtype == torch.float32


def waiting(shape: tuple[int, ...], dtype: torch.dtype, decode: Callable[[], Tensor]) -> nn.Parameter:
    """Return a parameter that waits.

    Args:
        decode: gives the weight; called each time that it is looked at.
    """
    weight = nn.Parameter(torch.zeros(1, dtype=dtype).expand(shape))
    DECODE.set(weight, decode)
    return weight


def look(weight: Tensor) -> Tensor:
    """Return what a parameter holds, or will hold."""
    decode: Callable[[], Tensor] | None = DECODE.get(weight)
    return weight.detach() if decode is None else decode()


def arrive(layers: Iterable[nn.Module]) -> None:
    """Decode the weights of these layers, if they wait.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight = waiting((1, 2), torch.float32, lambda: torch.ones(1, 2))
        >>> arrive([layer])
        >>> layer.weight.tolist()
        [[1.0, 1.0]]
    """
    for layer in layers:
        weight = layer._parameters.get("weight")
        if weight is not None and DECODE.get(weight) is not None:
            weight.data = look(weight)
            DECODE.pop(weight)


def give_back() -> None:
    """Return freed memory to the system, where the C library can be asked to (glibc).

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
