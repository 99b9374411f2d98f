from __future__ import annotations

import torch

from hf_sparse.pruning.patterns import Column, Row

SCORES = torch.tensor([[1.0, 2.0, 6.0], [4.0, 5.0, 0.0]])


def test_row_is_one_output() -> None:
    assert Row().groups_shape((2, 3)) == (2,)
    assert Row().pool(SCORES).tolist() == [3.0, 3.0]
    assert Row().pool(SCORES, "sum").tolist() == [9.0, 9.0]
    assert Row().expand(torch.tensor([False, True]), (2, 3)).int().tolist() == [[0, 0, 0], [1, 1, 1]]


def test_column_is_one_input() -> None:
    assert Column().groups_shape((2, 3)) == (3,)
    assert Column().pool(SCORES).tolist() == [2.5, 3.5, 3.0]
    assert Column().pool(SCORES, "sum").tolist() == [5.0, 7.0, 6.0]
    assert Column().expand(torch.tensor([False, True, True]), (2, 3)).int().tolist() == [[0, 1, 1], [0, 1, 1]]
