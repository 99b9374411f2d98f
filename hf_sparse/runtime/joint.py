"""Several packed layers with the same input (query, key, value; gate and up): one packed weight, one matmul."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import KERNELS
from .packed_weight import Packed


class JointLayer(Protocol):
    """What `Joint` needs of a layer."""

    out_features: int
    bias: Tensor | None

    @property
    def packed(self) -> Packed:
        """The packed weight of all layers together."""


class Joint:
    """What several layers with the same input share.

    The first layer that gets an input computes for all; the others, called with the very same tensor, return their
    part. That is right only if the tensor has not changed in between: either the calls are inside `open()`, or torch
    counts the changes of the tensor. It does not count them for inference tensors and in compiled code; outside of
    `open()` each layer then computes anew.

    Results are kept per thread. Every part is returned once, so that none outlives the forward pass.

    Args:
        form: of `candidates.JOINT`.
    """

    def __init__(self, layers: Sequence[JointLayer], form: str = "qkv") -> None:
        self.layers, self.form = tuple(layers), form
        self.heights = [layer.out_features for layer in layers]
        self.out_features = sum(self.heights)
        self.traced: dict[str, Any] = {}
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "traced": {}, "local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.local = threading.local()

    def part(self, layer: JointLayer, weight: Tensor) -> Tensor:
        """Return the rows of one layer."""
        first = sum(self.heights[: self.index(layer)])
        return weight[first : first + layer.out_features]

    def index(self, layer: JointLayer) -> int:
        """Return which of them a layer is."""
        for number, each in enumerate(self.layers):
            if each is layer:
                return number
        raise ValueError("not one of these layers")

    def open(self) -> dict[str, Any]:
        """Begin a scope in which nobody changes the input between two layers; `clear()` on what is returned ends it."""
        held = self._held()
        held.clear()
        held["unchanged"] = True
        return held

    def product(self, layer: JointLayer, x: Tensor) -> Tensor:
        """Return the output of one layer."""
        held, index, version = self._held(), self.index(layer), _version(x)
        known = held.get("input") is x and index in held["parts"]
        if known and (held.get("unchanged") or (version is not None and held["version"] == version)):
            parts = held["parts"]
        else:
            parts = dict(enumerate(self._split(layer.packed, x)))
            held["input"], held["version"], held["parts"] = x, version, parts
        out: Tensor = parts.pop(index)
        if not parts or (version is None and not held.get("unchanged")):
            held.clear()
        return out

    def _split(self, packed: Packed, x: Tensor) -> Sequence[Tensor]:
        parts = packed.multiply(x, self.bias()).split(self.heights, dim=-1)
        if KERNELS[packed.kernel].fused or torch.compiler.is_compiling():
            return parts
        # What follows rounds alike only where numbers lie as those of layers that are packed one by one.
        return [part.contiguous() for part in parts]

    def bias(self) -> Tensor | None:
        """Return the biases of all layers, concatenated."""
        # At each call: a bias can be changed in place.
        biases = [layer.bias for layer in self.layers]
        return None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])

    def _held(self) -> dict[str, Any]:
        # A compiler sees no threads, and cannot look into those of Python.
        return self.traced if torch.compiler.is_compiling() else self.local.__dict__


def _version(x: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None if torch does not count."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
