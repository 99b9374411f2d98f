"""Dense: the tensor itself."""

import zlib

import torch

from hf_sparse.formats.codecs import decode, encode


def test_dense_is_what_auto_chooses_when_nothing_is_zero():
    tensor = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    entry, parts = encode(tensor)
    assert (entry.codec, entry.shape, entry.dtype, entry.nonzeros, entry.options) == ("dense", (2, 2), "F32", 4, {})
    assert set(parts) == {""}
    assert torch.equal(parts[""], tensor)


def test_dense_holds_tensors_that_are_never_packed():
    for tensor in (torch.zeros(1000), torch.tensor(0.0), torch.zeros(0, 5), torch.zeros(5, 0, 2)):
        entry, parts = encode(tensor, "bitmask")
        assert entry.codec == "dense"
        assert decode(entry, parts).shape == tensor.shape


def test_dense_checksum_is_the_crc_of_type_shape_and_little_endian_bytes():
    pair, single = torch.tensor([1, 2], dtype=torch.int16), torch.tensor(1, dtype=torch.int8)
    cases = (pair, b"I16[2]\1\0\2\0"), (pair.view(1, 2), b"I16[1,2]\1\0\2\0"), (single, b"I8[]\1")
    for tensor, covered in cases:
        assert encode(tensor, "dense")[0].checksum == f"crc32:{zlib.crc32(covered):08x}"


def test_dense_stores_a_transposed_tensor_in_c_order():
    tensor = torch.arange(6.0).view(2, 3).t()
    entry, parts = encode(tensor, "dense")
    assert parts[""].is_contiguous()
    assert torch.equal(decode(entry, parts), tensor)
