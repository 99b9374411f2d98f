"""Planes: the order of bytes by hand, and what it is for."""

import zlib

import torch

from hf_sparse.formats.codecs import decode, encode, pack
from hf_sparse.formats.codecs.base import Source
from hf_sparse.formats.codecs.planes import Planes


def test_planes_stores_all_low_bytes_before_the_high_bytes():
    weight = torch.tensor([[0, 0x0102, 0, 0x0304]], dtype=torch.int16)
    entry, parts = pack(Source(weight), Planes())
    assert list(zlib.decompress(parts[""].numpy().tobytes(), -15)) == [2, 4, 1, 3]
    assert parts[""].dtype == torch.uint8
    assert torch.equal(decode(entry, parts), weight)


def test_planes_is_used_only_when_the_smallest_is_asked_for():
    weight = torch.where(torch.rand(512, 512) < 0.1, torch.randn(512, 512) * 0.04, 0.0).half()
    fast, small = encode(weight), encode(weight, "smallest")
    assert (fast[0].codec, small[0].codec) == ("gap", "planes")
    assert sum(p.nbytes for p in small[1].values()) <= 0.118 * weight.nbytes < sum(p.nbytes for p in fast[1].values())


def test_planes_makes_a_tensor_without_zeros_smaller_too():
    weight = (torch.randn(256, 256) * 0.04).bfloat16()
    entry, parts = encode(weight, "smallest")
    assert entry.codec == "planes"
    assert sum(part.nbytes for part in parts.values()) < 0.75 * weight.nbytes
    assert torch.equal(decode(entry, parts), weight)
