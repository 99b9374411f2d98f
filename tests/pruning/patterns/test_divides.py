"""Rows of a weight that a pattern divides can be pooled and expanded part by part, to the last bit."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.modeling.layer_kinds import MatrixView
from hf_sparse.pruning.patterns import NM, Block, Column, Element, OnMatrix, Pattern, Row
from hf_sparse.pruning.patterns.lines import AssignedLines, Lines


@pytest.mark.parametrize(
    ("pattern", "dividing"),
    [
        (Element(), (4, 8, 16)),
        (NM(2, 4), (4, 8, 16)),
        (Block(rows=4, cols=1), (4, 8, 16)),
        (Block(rows=8, cols=4), (8, 16)),
        (Row(), (4, 8, 16)),
        (Column(), ()),
        (Lines(axis=0, size=8), (8, 16)),
        (Lines(axis=0, size=0), ()),
        (Lines(axis=1, size=8), ()),
        (AssignedLines(axis=0, groups=1, owners=(0,) * 32), ()),
        (OnMatrix(Element(), MatrixView((4, 4), (1, 0))), ()),
    ],
)
def test_parts_are_those_of_the_whole(pattern: Pattern, dividing: tuple[int, ...]) -> None:
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    assert tuple(rows for rows in (4, 8, 16) if pattern.divides(rows)) == dividing
    for rows in dividing:
        scores = [pattern.pool(part) for part in weight.split(rows)]
        assert torch.equal(torch.cat(scores), pattern.pool(weight))
        kept = [part > 0 for part in scores]
        masks = [pattern.expand(part, (rows, 16)) for part in kept]
        assert torch.equal(torch.cat(masks), pattern.expand(torch.cat(kept), (32, 16)))
