from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_sparse import PatternError, RecipeError
from hf_sparse.pruning.patterns import Block

SCORES = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]])


def test_block_pools_rectangles_of_rows_by_cols() -> None:
    assert Block(rows=2, cols=3).pool(SCORES).tolist() == [[5.0, 8.0]]
    assert Block(rows=2, cols=3).pool(SCORES, "sum").tolist() == [[30.0, 48.0]]
    assert Block(rows=1, cols=2).pool(SCORES).tolist() == [[1.5, 3.5, 5.5], [7.5, 9.5, 11.5]]


def test_block_expands_to_rectangles() -> None:
    mask = Block(rows=2, cols=1).expand(torch.tensor([[True, False, True], [False, False, True]]), (4, 3))
    assert mask.int().tolist() == [[1, 0, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1]]


def test_block_counts_outputs_then_inputs() -> None:
    assert Block(rows=4, cols=8).groups_shape((8, 64)) == (2, 8)


def test_block_of_all_of_a_weight_is_one_group() -> None:
    assert Block(rows=2, cols=6).pool(SCORES).tolist() == [[6.5]]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            Block(rows=32, cols=7),
            "pattern block 32x7 needs the output dimension to be a multiple of 32, but 'encoder.0.dense.weight' has "
            'shape (48, 70). Exclude it with exclude: "encoder.0.dense" or use pattern element.',
        ),
        (
            Block(rows=16, cols=32),
            "pattern block 16x32 needs the input dimension to be a multiple of 32, but 'encoder.0.dense.weight' has "
            'shape (48, 70). Exclude it with exclude: "encoder.0.dense" or use pattern element.',
        ),
    ],
)
def test_block_refuses_a_shape_that_it_does_not_divide(block: Block, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        block.check((48, 70), "encoder.0.dense.weight")
    assert str(caught.value) == message


@pytest.mark.parametrize("size", [0, -1, 2.0, "32", True, None])
def test_block_refuses_sizes_that_are_no_whole_numbers(size: Any) -> None:
    with pytest.raises(RecipeError, match="`rows` must be a positive integer, got "):
        Block(rows=size)
    with pytest.raises(RecipeError, match="`cols` must be a positive integer, got "):
        Block(cols=size)
