"""Gap: gap bytes by hand, and the distance to the entropy."""

import math
import zlib

import pytest
import torch

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.codecs import decode, pack
from hf_sparse.formats.codecs.base import Source
from hf_sparse.formats.codecs.gap import Gap


def gap_bytes(parts):
    return list(zlib.decompress(parts["_gaps"].numpy().tobytes(), -15))


def raw_deflate(data):
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return torch.frombuffer(bytearray(coder.compress(bytes(data)) + coder.flush()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("index", "gaps"),
    [
        ([0], [0]),
        ([0, 1, 4], [0, 0, 2]),
        ([254], [254]),
        ([255], [255, 0]),
        ([3, 3 + 1 + 600], [3, 255, 255, 90]),
        ([999], [255, 255, 255, 234]),
        ([], []),
    ],
)
def test_gap_counts_the_zeros_before_each_value(index, gaps):
    weight = torch.zeros(1, 1000)
    weight[0, index] = torch.arange(1.0, len(index) + 1)
    entry, parts = pack(Source(weight), Gap())
    assert gap_bytes(parts) == gaps
    assert entry.options["gaps"] == len(gaps)
    assert torch.equal(decode(entry, parts), weight)


def test_gap_counts_blocks_when_it_has_a_block_shape():
    weight = torch.zeros(4, 6)
    weight[2:4, 3:6] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    entry, parts = pack(Source(weight), Gap(2, 3))
    assert gap_bytes(parts) == [3]
    assert parts[""].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert torch.equal(decode(entry, parts), weight)


@pytest.mark.parametrize("density", [0.2, 0.1, 0.05, 0.03])
def test_gap_comes_within_two_percent_of_the_entropy_of_a_random_mask(density):
    weight = torch.where(torch.rand(768, 768) < density, 1.0, 0.0)
    _, parts = pack(Source(weight), Gap())
    p = weight.count_nonzero().item() / weight.numel()
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * weight.numel() / 8
    assert entropy < parts["_gaps"].numel() < 1.02 * entropy


@pytest.mark.parametrize(
    ("gaps", "complaint"),
    [
        ([0, 255, 3], "exactly 3 values"),
        ([0, 0, 255], "exactly 3 values"),
        ([200, 254, 254], "behind the last of 500"),
    ],
)
def test_gap_refuses_gaps_that_do_not_place_its_values(gaps, complaint):
    weight = torch.zeros(1, 500)
    weight[0, :3] = 1.0
    entry, parts = pack(Source(weight), Gap())
    parts["_gaps"] = raw_deflate(gaps)
    entry.options["deflated"] = parts["_gaps"].numel()  # type: ignore[index]
    with pytest.raises(CheckpointError, match=complaint):
        decode(entry, parts)


def test_gap_refuses_more_gap_bytes_than_the_tensor_can_need():
    weight = torch.zeros(1, 500)
    weight[0, 0] = 1.0
    entry, parts = pack(Source(weight), Gap())
    entry.options["gaps"] = 3  # type: ignore[index]
    with pytest.raises(CheckpointError, match="3 gap bytes cannot place 1 of 500 blocks"):
        decode(entry, parts)
