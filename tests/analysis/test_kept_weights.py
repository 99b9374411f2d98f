"""Which heads and weights are kept, by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from hf_sparse import compact
from hf_sparse.analysis.kept_weights import kept_groups, shrink


def test_removed_heads_count_as_pruned(sparse: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(sparse)
    before = [block.kept.gt(0).tolist() for block in kept_groups(model)]
    compact(model)
    assert [block.kept.gt(0).tolist() for block in kept_groups(model)] == before
    assert [sum(alive) for alive in before] == [32, 2, 32, 2]


def test_block_map_is_the_mean_of_what_it_stands_for() -> None:
    weight = torch.zeros(128, 256)
    weight[:4, :2] = 1.0
    small = shrink(weight)
    assert small.shape == (32, 64)
    assert small[0, 0] == 0.5
    assert float(small.sum()) == 0.5
