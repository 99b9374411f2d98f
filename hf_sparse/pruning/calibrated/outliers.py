"""How many outliers each block has on calibration data, for selection "owl"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...modeling.layer_kinds import Slot
from .one_block import inside, observe
from .stacks import StackObserver, Unreached, passes_over
from .statistics import InputStatistics
from .walk import Step, Steps


def outlier_shares(walk: Steps, weights: Mapping[str, Slot], outlier: float) -> dict[str, float]:
    """Return the share of `|W_ij| ‖x_j‖₂` above `outlier` times their mean over the block, by name; nothing changes.

    Experts that no token reached do not count: nothing is known of their inputs.

    Args:
        weights: by name of the layer, or of the weight where a module has several; those of one block count together.
        outlier: `M` of the paper.

    Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)", section 3.1.
    """
    shares: dict[str, float] = {}
    for step in walk.steps():
        found = {name: weights[name] for name in inside(step, weights)}
        if found:
            importance = list(_importance(step, found))
            total = sum(tensor.numel() for tensor in importance)
            mean = sum(float(tensor.double().sum()) for tensor in importance) / total
            above = sum(int((tensor > outlier * mean).sum()) for tensor in importance)
            shares.update(dict.fromkeys(found, above / total))
        step.advance()
    return shares


def _importance(step: Step, weights: Mapping[str, Slot]) -> Iterator[Tensor]:
    """Yield the importance of the entries of each matrix of a block."""
    stacks = {name: slot for name, slot in weights.items() if slot.parts is not None}
    (parts,) = passes_over(stacks, ()) or [{}]  # norms alone take little memory
    stacked = StackObserver(stacks, (), parts)
    observer = observe(step, {name: slot.module for name, slot in weights.items() if name not in stacks}, (), stacked)
    reached = Unreached()
    reached.add(stacked)
    reached.end_block()
    for name, slot in weights.items():
        if name not in stacks:
            yield _scores(slot.view.to_matrix(slot.tensor.detach()), observer.of(name))
    for name, part in stacked.each():
        inputs, slot = stacked.of(name, part), stacks[name]
        if inputs is not None:
            yield _scores(slot.part_view.to_matrix(slot.tensor.detach()[part]), inputs)


def _scores(weight: Tensor, inputs: InputStatistics) -> Tensor:
    norms = inputs.norms
    return torch.mul(weight.to(norms.dtype).abs(), norms.to(weight.device))
