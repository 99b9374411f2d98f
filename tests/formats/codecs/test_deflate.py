"""Deflate: the bitmask of `bitmask`, compressed and bounded."""

import zlib

import numpy as np
import pytest
import torch

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.codecs import decode, encode
from hf_sparse.formats.codecs.deflate import inflate


def raw_deflate(data):
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return torch.frombuffer(bytearray(coder.compress(data) + coder.flush()), dtype=torch.uint8)


def test_deflate_holds_the_bitmask():
    weight = torch.zeros(64, 64, dtype=torch.float16)
    weight[::2] = 1.5
    entry, parts = encode(weight, "deflate")
    mask = zlib.decompress(parts["_mask_deflated"].numpy().tobytes(), -15)
    assert np.array_equal(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"), (weight.view(-1) != 0).int())
    assert entry.options == {"deflated": parts["_mask_deflated"].numel()}


def test_deflate_costs_little_more_than_the_entropy_of_two_of_four():
    kept = torch.rand(256, 64, 4).argsort(-1) < 2
    _, parts = encode(torch.where(kept, 1.0, 0.0).view(256, 256).half(), "deflate")
    assert parts["_mask_deflated"].numel() * 8 <= 1.04 * 0.6462 * 256 * 256  # log2(6) / 4 bits for each weight


def test_inflate_returns_exactly_what_was_deflated():
    assert inflate(raw_deflate(b"abc" * 99), 297).tobytes() == b"abc" * 99
    assert len(inflate(raw_deflate(b""), 0)) == 0


@pytest.mark.parametrize("claimed", [0, 296, 298])
def test_inflate_refuses_a_stream_of_another_length(claimed):
    with pytest.raises(CheckpointError, match=f"exactly {claimed} bytes"):
        inflate(raw_deflate(b"abc" * 99), claimed)


def test_inflate_refuses_a_stream_that_is_cut_or_continued():
    stream = raw_deflate(b"abc" * 99)
    for wrong in (stream[:-1], torch.cat([stream, stream[:1]]), stream[:0]):
        with pytest.raises(CheckpointError, match="deflate stream"):
            inflate(wrong, 297)


def test_inflate_does_not_blow_up_a_bomb():
    bomb = raw_deflate(bytes(1 << 28))
    with pytest.raises(CheckpointError, match="exactly 1000 bytes"):
        inflate(bomb, 1000)


def test_deflate_refuses_a_damaged_stream():
    entry, parts = encode(torch.eye(64), "deflate")
    parts["_mask_deflated"].fill_(255)
    with pytest.raises(CheckpointError, match="deflate stream is corrupted"):
        decode(entry, parts)
