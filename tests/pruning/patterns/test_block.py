from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf_sparse import PatternError, RecipeError, SparsityConfig, sparsify
from hf_sparse.config.resolve import resolved
from hf_sparse.config.sparsity import PATTERNS
from hf_sparse.pruning.patterns import Block
from hf_sparse.utils.strict_yaml import dump_yaml, override, parse_yaml

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


@pytest.mark.parametrize(("text", "rows", "cols"), [("4x1", 4, 1), ("32x32", 32, 32), ("1x16", 1, 16)])
def test_rows_x_columns_is_a_block_everywhere(text: str, rows: int, cols: int) -> None:
    whole = {"name": "block", "rows": rows, "cols": cols}
    assert PATTERNS.build(text) == PATTERNS.build({"name": text}) == Block(rows=rows, cols=cols)
    recipe = override({"sparsity": {"sparsity": 0.5}}, f"sparsity.pattern={text}")
    config = SparsityConfig.from_dict(parse_yaml(dump_yaml(recipe))["sparsity"])
    assert config.groups[0].pattern == text
    assert resolved(config) == resolved(SparsityConfig(sparsity=0.5, pattern=whole))
    short = torch.nn.Sequential(torch.nn.Linear(32, 32))
    long = copy.deepcopy(short)
    sparsify(short, SparsityConfig(sparsity=0.5, pattern=text, targets="*"))
    sparsify(long, SparsityConfig(sparsity=0.5, pattern=whole, targets="*"))
    assert torch.equal(short.state_dict()["0.weight"], long.state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x4", r"pattern '0x4': `rows` must be a positive integer, got 0"),
        ("4x0", r"pattern '4x0': `cols` must be a positive integer, got 0"),
        ("4x", r"unknown pattern '4x'.* for short as in .*'4x1' \(blocks of 4 outputs x 1 input\)"),
        ("x4", r"unknown pattern 'x4'.* for short as in .*'4x1'"),
        ("4x1x1", r"unknown pattern '4x1x1'.* for short as in .*'4x1'"),
        ("-4x1", r"unknown pattern '-4x1'.* for short as in .*'4x1'"),
    ],
)
def test_what_is_no_block_is_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SparsityConfig(sparsity=0.5, pattern=text)
