"""Block: the order of blocks and of their elements by hand, and sides that are no multiples."""

import pytest
import torch

from hf_sparse.errors import CheckpointError, RecipeError
from hf_sparse.formats.codecs import decode, encode, pack
from hf_sparse.formats.codecs.base import Source
from hf_sparse.formats.codecs.block import Block, block_shape

WEIGHT = torch.tensor(
    [
        [0, 0, 1, 2],
        [0, 0, 3, 4],
        [5, 0, 0, 0],
        [0, 6, 0, 0],
    ],
    dtype=torch.int8,
)


def test_block_stores_blocks_row_by_row_and_each_in_c_order():
    entry, parts = pack(Source(WEIGHT), Block(2, 2))
    assert parts["_blocks"].tolist() == [0b0110]
    assert parts[""].tolist() == [1, 2, 3, 4, 5, 0, 0, 6]
    assert entry.options == {"rows": 2, "cols": 2, "kept": 2}
    assert torch.equal(decode(entry, parts), WEIGHT)


def test_block_fills_up_sides_that_are_no_multiples():
    entry, parts = pack(Source(WEIGHT[:3, :3]), Block(2, 2))
    assert parts["_blocks"].tolist() == [0b0110]
    assert parts[""].tolist() == [1, 0, 3, 0, 5, 0, 0, 0]
    assert torch.equal(decode(entry, parts), WEIGHT[:3, :3])


def test_block_takes_all_dimensions_but_the_first_as_columns():
    _, parts = pack(Source(WEIGHT.view(4, 2, 2)), Block(2, 2))
    assert parts[""].tolist() == [1, 2, 3, 4, 5, 0, 0, 6]


def test_block_is_found_by_auto_in_the_largest_common_shape():
    for rows, cols in ((32, 32), (16, 16), (4, 4), (16, 1)):
        kept = torch.rand(256 // rows, 256 // cols) < 0.3
        weight = kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1) * torch.ones(256, 256)
        assert block_shape(Source(weight)) == (rows, cols)
    assert block_shape(Source(torch.where(torch.rand(256, 256) < 0.3, 1.0, 0.0))) is None


def test_block_is_what_auto_stores_for_large_blocks():
    kept = (torch.randperm(64) < 16).view(8, 8).repeat_interleave(32, 0).repeat_interleave(32, 1)
    weight = torch.where(kept, torch.rand(256, 256) + 1, 0.0).half()
    entry, parts = encode(weight)
    assert (entry.codec, entry.options) == ("block", {"rows": 32, "cols": 32, "kept": 16})
    assert sum(part.nbytes for part in parts.values()) == weight.nbytes // 4 + 8


def test_block_refuses_a_bitmap_with_another_number_of_blocks():
    entry, parts = pack(Source(WEIGHT), Block(2, 2))
    parts["_blocks"] = torch.tensor([0b0111], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="keeps 3 blocks, and there are 2"):
        decode(entry, parts)


def test_block_larger_than_the_tensor_is_not_used():
    assert Block(5, 1).stored_bytes(Source(WEIGHT)) is None
    with pytest.raises(RecipeError, match="must be a positive integer"):
        Block(0, 1)
