"""A small sparse layer, and the kernels of a report."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def kernels_of(report: Any) -> dict[str, str]:
    return {layer.name: layer.kernel for layer in report.layers}


def sparse_linear() -> nn.Linear:
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight[:, 8:] = 0.0
    return layer
