"""How many outliers each block has on calibration data, for selection "owl"."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...modeling.layer_kinds import MatrixLayer, oriented
from .statistics import InputObserver
from .tasks import inside, observe
from .walk import Steps


def outlier_shares(walk: Steps, layers: Mapping[str, MatrixLayer], outlier: float) -> dict[str, float]:
    """Return the share of `|W_ij| ‖x_j‖₂` above `outlier` times their mean over the block, by layer; nothing changes.

    Args:
        layers: by name; those of one block count together.
        outlier: `M` of the paper.

    Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)", section 3.1.
    """
    shares: dict[str, float] = {}
    for step in walk.steps():
        found = {name: layers[name] for name in inside(step, layers)}
        if found:
            observer = observe(step, found, ())
            importance = [_importance(name, layer, observer) for name, layer in found.items()]
            total = sum(tensor.numel() for tensor in importance)
            mean = sum(float(tensor.double().sum()) for tensor in importance) / total
            above = sum(int((tensor > outlier * mean).sum()) for tensor in importance)
            shares.update(dict.fromkeys(found, above / total))
        step.advance()
    return shares


def _importance(name: str, layer: MatrixLayer, observer: InputObserver) -> Tensor:
    norms = observer.of(name).norms
    weight = oriented(layer, layer.weight.detach()).to(norms.dtype).abs()
    return torch.mul(weight, norms.to(weight.device))
