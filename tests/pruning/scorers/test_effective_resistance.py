"""Effective resistance by hand: trees, rings, parallel edges, graphs in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import SparsityError, sparsify
from hf_sparse.config.sparsity import SCORERS


def scores(weight: list[list[float]]) -> list[list[float]]:
    found: list[list[float]] = SCORERS.build("effective_resistance").element_scores(torch.tensor(weight)).tolist()
    return found


def test_every_edge_of_a_tree_has_leverage_one() -> None:
    assert scores([[2.0, 0.0], [-3.0, 0.1]]) == [[pytest.approx(1), 0], [pytest.approx(1), pytest.approx(1)]]


def test_ring_by_hand() -> None:
    # Conductances 1, 2, 4 and 4 in a ring: beside edge e is the rest in series, 1 / sum of the other 1/w.
    edges = [1.0, 2.0, 4.0, 4.0]  # (0,0) (0,1) (1,1) (1,0)
    expected = []
    for own in range(4):
        rest = 1 / sum(1 / w for index, w in enumerate(edges) if index != own)
        expected.append(edges[own] / (edges[own] + rest))
    found = scores([[1.0, -2.0], [4.0, 4.0]])
    assert [found[0][0], found[0][1], found[1][1], found[1][0]] == pytest.approx(expected)


def test_leverages_add_up_to_the_nodes_minus_the_pieces() -> None:
    weight = torch.randn(7, 11)
    assert float(SCORERS.build("effective_resistance").element_scores(weight).sum()) == pytest.approx(17, abs=1e-3)
    apart = torch.block_diag(torch.randn(3, 4), torch.randn(2, 2))
    assert float(SCORERS.build("effective_resistance").element_scores(apart).sum()) == pytest.approx(9, abs=1e-3)


def test_scale_does_not_matter_and_nothing_is_nothing() -> None:
    weight = torch.randn(5, 6)
    scorer = SCORERS.build("effective_resistance")
    torch.testing.assert_close(scorer.element_scores(weight * 1e-20), scorer.element_scores(weight))
    assert scorer.element_scores(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(("scorer", "left"), [("effective_resistance", 1), ("magnitude", 0)])
def test_the_only_edge_of_an_output_stays(scorer: str, left: int) -> None:
    """Magnitude removes the whole last row; the leverage of its one edge is 1, because nothing else leads there."""
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[9.0, 8, 7, 6], [9, 7, 8, 6], [6, 9, 8, 7], [0.1, 0, 0, 0]]))
    model: Any = sparsify(nn.Sequential(layer), {"targets": "*", "scorer": scorer, "sparsity": 0.5})
    assert int(torch.count_nonzero(model[0].weight[3])) == left


def test_nan_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(SparsityError, match="NaN"):
        sparsify(nn.Sequential(layer), {"targets": "*", "scorer": "effective_resistance", "sparsity": 0.5})
