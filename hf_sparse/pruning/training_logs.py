"""Numbers for a training log."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .group import PruningGroup
from .shards import count_true, whole


def training_logs(groups: Sequence[PruningGroup]) -> dict[str, float]:
    """Return sparsity in total and per group, thresholds, penalty, norms of scores; groups have masks."""
    out: dict[str, float] = {}
    zeros = total = 0
    for index, group in enumerate(groups):
        tail = f"_{index}" if len(groups) > 1 else ""
        masks = [member.masked.mask for unit in group.units for member in unit.members]
        size = sum(mask.numel() for mask in masks)
        removed = size - count_true(masks)
        zeros, total = zeros + removed, total + size
        if tail:
            out[f"sparsity{tail}"] = removed / size
        for key, value in (group.scorer.logs(group.selection.threshold) | group.selection.logs()).items():
            out[key + tail] = value
        if group.scores:
            squares = sum(float(whole(score.detach().double().square().sum())) for score in group.scores)
            out[f"score_norm{tail}"] = squares**0.5
        if group.scorer.penalized:
            with torch.no_grad():
                out[f"penalty{tail}"] = float(group.scorer.penalty(group.scores))
    return {"sparsity": zeros / max(1, total), **out}
