"""Bitmask: bytes typed by hand."""

import pytest
import torch

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.codecs import decode, encode, pack
from hf_sparse.formats.codecs.base import Source
from hf_sparse.formats.codecs.bitmask import Bitmask

WEIGHT = torch.zeros(2, 5)
WEIGHT[0, 1], WEIGHT[0, 3], WEIGHT[1, 4] = 5.0, -0.0, 7.0


def test_bitmask_counts_bits_from_the_lowest_over_the_whole_tensor():
    _, parts = encode(WEIGHT, "bitmask")
    assert parts["_mask"].tolist() == [0b00001010, 0b10]
    assert parts[""].tolist() == [5.0, -0.0, 7.0]


def test_bitmask_stores_minus_zero_because_its_sign_bit_is_set():
    entry, parts = encode(WEIGHT, "bitmask")
    assert entry.nonzeros == 3
    assert torch.signbit(decode(entry, parts)).sum() == 1


def test_bitmask_refuses_a_mask_with_another_number_of_ones():
    entry, parts = encode(WEIGHT, "bitmask")
    parts["_mask"][0] = 0b1110
    with pytest.raises(CheckpointError, match=r"'w' \(codec bitmask\).*as many ones as there are values \(3\)"):
        decode(entry, parts, "w")


def test_bitmask_refuses_bits_behind_the_end():
    entry, parts = encode(WEIGHT, "bitmask")
    parts["_mask"].copy_(torch.tensor([0b1010, 0b100], dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="behind the end"):
        decode(entry, parts)


@pytest.mark.parametrize("numel", [(1 << 18) - 8, 1 << 18, (1 << 18) + 3, 3 << 18])
def test_bitmask_decodes_across_its_chunks(numel):
    tensor = (torch.arange(numel) % 3 == 0).to(torch.int8).view(1, -1) * 5
    entry, parts = pack(Source(tensor), Bitmask())
    assert torch.equal(decode(entry, parts), tensor)
