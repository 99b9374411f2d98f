"""n:m: positions packed by hand, groups that lack nonzeros."""

import pytest
import torch

from hf_sparse.errors import CheckpointError, RecipeError
from hf_sparse.formats.codecs import decode, encode, pack
from hf_sparse.formats.codecs.base import Source
from hf_sparse.formats.codecs.nm import NM

WEIGHT = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 4.0, 0.0, 0.0]])


def test_nm_packs_two_bits_for_each_position_of_two_of_four():
    entry, parts = pack(Source(WEIGHT), NM(2, 4))
    assert parts[""].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert parts["_positions"].tolist() == [0b01_00_11_01]
    assert entry.options == {"n": 2, "m": 4}


def test_nm_fills_a_group_that_has_fewer_nonzeros_with_its_first_zeros():
    weight = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
    entry, parts = pack(Source(weight), NM(2, 4))
    assert parts[""].tolist() == [0.0, 9.0, 0.0, 0.0]
    assert parts["_positions"].tolist() == [0b01_00_11_00]
    assert torch.equal(decode(entry, parts), weight)


def test_nm_takes_three_bits_for_positions_among_five():
    weight = torch.tensor([[0, 0, 0, 0, 7, 8, 0, 0, 0, 0]], dtype=torch.int8)
    entry, parts = pack(Source(weight), NM(1, 5))
    assert parts["_positions"].tolist() == [0b000_100]
    assert torch.equal(decode(entry, parts), weight)


def test_nm_costs_nine_sixteenths_of_fp16_for_two_of_four():
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float16).repeat(64, 16)
    entry, parts = encode(weight, "2:4")
    assert entry.codec == "n:m"
    assert sum(part.nbytes for part in parts.values()) == 0.5625 * weight.nbytes


def test_nm_is_not_used_for_a_tensor_that_breaks_the_pattern():
    weight = torch.zeros(64, 64)
    weight[5, 8:11] = 1.0
    assert NM(2, 4).stored_bytes(Source(weight)) is None
    assert NM(3, 4).stored_bytes(Source(weight)) is not None
    assert NM(2, 3).stored_bytes(Source(weight)) is None  # 4096 is no multiple of 3
    assert encode(weight, "2:4")[0].codec == "dense"


@pytest.mark.parametrize("positions", [[0b01_00_11_11], [0b01_00_01_11], [0b00_01_11_01]])
def test_nm_refuses_positions_out_of_order(positions):
    entry, parts = pack(Source(WEIGHT), NM(2, 4))
    parts["_positions"] = torch.tensor(positions, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="not in ascending order"):
        decode(entry, parts)


def test_nm_refuses_a_position_outside_its_group():
    entry, parts = pack(Source(torch.tensor([[0.0, 0.0, 1.0]])), NM(1, 3))
    parts["_positions"] = torch.tensor([3], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="a group of 3"):
        decode(entry, parts)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 1), (1, 257)])
def test_nm_refuses_patterns_that_are_none(n, m):
    with pytest.raises(RecipeError, match=r"`[nm]` must be an integer in \[[12], \d+\], got"):
        NM(n, m)
