"""Caches of a generation, as an attention with fewer heads uses them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..class_swap import Swapped, plain_class_of, restore, swap_class
from ..model_state import HEADS_PER_KV

NAMES = ("cache", "past_key_values", "layer_past")
"""Keyword arguments that hold it: transformers calls it `cache` from 5.24 on, and mostly `past_key_values` before."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of an attention, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def fill_cache(module: Any, cache: Any, hidden: Tensor, memory: Tensor | None) -> None:
    """Write empty keys and values of an attention without heads into the cache of a generation.

    Masks and positions are computed from the length of a cache, often that of its first layer.

    Args:
        module: with the `layer_idx` of the attention.
        cache: of transformers, or None.
        hidden: input of the attention.
        memory: input of key and value of a cross-attention; None for self-attention.
    """
    if cache is None:
        return
    index, source = module.layer_idx, hidden if memory is None else memory
    if hasattr(cache, "is_updated"):  # of an encoder-decoder model: two caches in one
        if memory is not None and cache.is_updated.get(index):
            return
        if memory is not None:
            cache.is_updated[index] = True
        cache = cache.self_attention_cache if memory is None else cache.cross_attention_cache
    nothing = torch.zeros((source.shape[0], 1, source.shape[1], 1), dtype=source.dtype, device=source.device)
    cache.update(nothing, nothing, index)


class UnevenQueries(Swapped):
    """An attention whose KV heads are read by different numbers of heads.

    The attention functions of transformers repeat each KV head equally often. Here that is done before they are called,
    behind the cache: the cache holds each KV head once, whatever its kind.
    """

    instance_attributes = ("cache_argument", HEADS_PER_KV.name)
    cache_argument: str

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Attend as before, with keys and values repeated for the heads that read them."""
        name, heads = self.cache_argument, getattr(self, HEADS_PER_KV.name)
        kwargs[name] = _Repeating(kwargs.get(name), heads)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def repeat_unevenly(core: nn.Module, heads_per_kv: tuple[int, ...]) -> None:
    """Let an attention repeat each KV head for as many heads as read it.

    Args:
        core: an attention whose class repeats none of them (`num_key_value_groups` is 1).
    """
    swap_class(core, UnevenQueries)
    HEADS_PER_KV.set(core, heads_per_kv)
    parameters = inspect.signature(plain_class_of(core).forward).parameters
    module: Any = core
    module.cache_argument = next(name for name in NAMES if name in parameters)


def repeat_evenly(core: nn.Module) -> None:
    """Undo `repeat_unevenly`."""
    restore(core, UnevenQueries)


class _Repeating:
    """A cache that hands out keys and values once for each head that reads them.

    Args:
        cache: what holds them; None = there is none, and only the present ones are repeated.
    """

    def __init__(self, cache: Any, heads_per_kv: tuple[int, ...]) -> None:
        self.cache, self.heads_per_kv = cache, heads_per_kv

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Update the cache.

        Shapes: `(batch, KV heads, new, size)` -> `(batch, heads, all, size)`
        """
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return self._repeat(keys), self._repeat(values)

    def _repeat(self, states: Tensor) -> Tensor:
        # Slices need no index tensor that would have to be on the right device.
        each = [states[:, kv : kv + 1].expand(-1, heads, -1, -1) for kv, heads in enumerate(self.heads_per_kv)]
        return torch.cat(each, dim=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)
