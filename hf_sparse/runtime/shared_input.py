"""Modules that give one input to several layers, which are packed as one weight: query, key and value; gate and up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..modeling.class_swap import swap_class
from .fused_parts import FusedParts, RuntimeBlock
from .joint import Joint


class SharedParts:
    """What a module computes with.

    Args:
        module: that calls the layers.
        paths: of the layers, below it.
        joint: what the layers share.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str], joint: Joint) -> None:
        self.parts = FusedParts(module, paths)
        self.joint = joint


class SharedInput(RuntimeBlock):
    """A module whose layers are one matmul: the first that is called computes for all."""

    instance_attributes = ("shared_input",)
    shared_input: SharedParts

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the plain module returns."""
        shared: SharedParts = self.shared_input
        if not shared.parts.intact():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        held = shared.joint.open()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            held.clear()


def share(module: nn.Module, parts: SharedParts, mixin: type[SharedInput] = SharedInput) -> None:
    """Let a module compute its layers, which are packed together, as one matmul."""
    swap_class(module, mixin)
    made: Any = module
    made.shared_input = parts
