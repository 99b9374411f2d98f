"""Models so small that what happens to them can be written down by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_sparse import Pruner, SparsityConfig


def one_layer(weight: list[list[float]], dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose only layer, `0`, has these weights and no bias."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=False, dtype=dtype)
    layer.weight.data.copy_(torch.tensor(weight))
    return nn.Sequential(layer)


def two_layers() -> Any:
    """Return a model with weights of (8, 16) and (16, 8), so that 4x4 blocks, 2:4, rows and columns all fit."""
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16))


def attached(model: nn.Module, **group: Any) -> Pruner:
    """Return a Pruner with its masks on all linear layers of a model; constant schedule unless told otherwise."""
    return Pruner(model, SparsityConfig(**{"targets": "*", "schedule": "constant", **group})).attach()
