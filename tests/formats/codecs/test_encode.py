"""encode and decode: the choice of a codec, and what is refused whatever the codec."""

import dataclasses

import pytest
import torch

from hf_sparse.errors import CheckpointError, RecipeError
from hf_sparse.formats.codecs import CODECS, MAX_RATIO, decode, encode, encode_all, layout


def bernoulli(density, rows=256, cols=256):
    return torch.where(torch.rand(rows, cols) < density, torch.randn(rows, cols), 0.0).half()


def size(parts):
    return sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize(
    ("density", "codec"), [(1.0, "dense"), (0.99, "dense"), (0.5, "bitmask"), (0.2, "deflate"), (0.1, "gap")]
)
def test_encode_chooses_by_density(density, codec):
    assert encode(bernoulli(density))[0].codec == codec


@pytest.mark.parametrize(("density", "limit"), [(0.5, 0.563), (0.2, 0.25), (0.1, 0.135), (0.05, 0.075), (0.03, 0.048)])
def test_encode_stays_within_the_promised_size(density, limit):
    kept = torch.ones(768 * 768)
    kept[torch.randperm(kept.numel())[round(kept.numel() * density) :]] = 0.0
    weight = kept.view(768, 768).half()
    assert size(encode(weight)[1]) <= limit * weight.nbytes


def test_encode_stores_dense_what_the_codec_cannot_make_smaller():
    entry, parts = encode(bernoulli(0.9), "csr")
    assert entry.codec == "dense"
    assert parts[""].shape == (256, 256)


def test_encode_never_writes_less_than_readers_accept():
    weight = torch.zeros(1024, 4096)
    for codec in ("auto", "smallest", "block", "gap", "csr", "deflate"):
        entry, parts = encode(weight, codec)
        assert entry.nbytes <= MAX_RATIO * (size(parts) + 64)
        assert torch.equal(decode(entry, parts), weight)


def test_encode_looks_at_the_true_size_where_a_sample_misleads():
    # All that is kept lies where the sample is taken: the stream is far shorter than it was estimated to be.
    weight = torch.zeros(384, 1536)
    weight[:4] = torch.where(torch.rand(4, 1536) < 0.05, torch.randn(4, 1536), 0.0)
    for codec in ("auto", "smallest", "deflate"):
        entry, parts = encode(weight, codec)
        assert entry.nbytes <= MAX_RATIO * (size(parts) + 64)
        assert torch.equal(decode(entry, parts), weight)


@pytest.mark.parametrize("codec", ["auto", "smallest", *CODECS])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3), (9,), (0,), ()])
def test_encode_stores_dense_what_has_no_elements_or_fewer_than_two_dimensions(shape, codec):
    entry, parts = encode(torch.zeros(shape, dtype=torch.bfloat16), codec)
    assert entry.codec == "dense"
    assert decode(entry, parts).shape == shape


def test_encode_names_the_nearest_codec_when_it_is_unknown():
    with pytest.raises(RecipeError, match="unknown codec 'bitmaks'; did you mean 'bitmask'"):
        encode(torch.zeros(8, 8), "bitmaks")


def test_encode_refuses_tensors_that_the_format_has_no_type_for():
    with pytest.raises(CheckpointError, match="complex128"):
        encode(torch.zeros(2, 2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match="sparse_coo"):
        encode(torch.zeros(2, 2).to_sparse())


def test_encode_leaves_parameters_alone():
    weight = torch.nn.Parameter(torch.eye(64))
    entry, parts = encode(weight)
    assert not parts[""].requires_grad
    assert torch.equal(decode(entry, parts), torch.eye(64))


def test_encode_all_returns_the_same_as_encode_one_by_one():
    tensors = [bernoulli(density) for density in (0.0, 0.1, 0.5, 1.0)]
    for (entry, parts), tensor in zip(encode_all(tensors), tensors, strict=True):
        expected_entry, expected = encode(tensor)
        assert entry == expected_entry
        assert all(torch.equal(parts[suffix], expected[suffix]) for suffix in expected)


def test_decode_verifies_the_checksum():
    entry, parts = encode(bernoulli(0.5), "bitmask")
    parts[""].view(torch.int16)[7] ^= 1
    with pytest.raises(CheckpointError, match=r"tensor 'w' \(codec bitmask\): the content is corrupted: the checksum"):
        decode(entry, parts, "w")


def test_decode_verifies_the_count_of_nonzeros():
    weight = torch.tensor([[1.0, 0.0]])
    entry, parts = encode(weight, "dense")
    with pytest.raises(CheckpointError, match="says 2 nonzeros, and there are 1"):
        decode(dataclasses.replace(entry, nonzeros=2), parts)


def test_decode_refuses_values_of_another_type():
    entry, parts = encode(bernoulli(0.5), "bitmask")
    with pytest.raises(CheckpointError, match=r"part '' must be F16 of shape \(\d+,\), and is torch.float32"):
        decode(entry, {**parts, "": parts[""].float()})


def test_layout_refuses_an_unknown_codec_and_other_options():
    entry, _ = encode(bernoulli(0.5), "bitmask")
    with pytest.raises(CheckpointError, match="unknown codec 'zip'; this hf_sparse knows bitmask, block"):
        layout(dataclasses.replace(entry, codec="zip"))
    with pytest.raises(CheckpointError, match=r"codec bitmask has the options \[\], not \['rows'\]"):
        layout(dataclasses.replace(entry, options={"rows": 2}))
    with pytest.raises(CheckpointError, match=r"`[nm]` must be an integer in \[[12], \d+\], got"):
        layout(dataclasses.replace(entry, codec="n:m", options={"n": 5, "m": 4}))


@pytest.mark.parametrize("shape", [(65536,), (0, 256), ()])
def test_layout_refuses_to_unpack_what_is_never_packed(shape):
    entry, _ = encode(bernoulli(0.5), "bitmask")
    with pytest.raises(CheckpointError, match="only tensors with elements and two dimensions are packed"):
        layout(dataclasses.replace(entry, shape=shape, nonzeros=0))
