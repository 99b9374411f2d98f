"""What every codec promises, over all that are registered: bits come back, sizes are known, damage is seen."""

import dataclasses

import numpy as np
import pytest
import torch

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.codecs import CODECS, DTYPE_NAMES, SUFFIXES, Source, decode, encode, layout, pack
from hf_sparse.formats.codecs.base import as_bits

VARIANTS = [CODECS.build(name) for name in CODECS] + [
    CODECS.build(spec)
    for spec in (
        "1:4",
        "3:5",
        "2:2",
        {"name": "block", "rows": 3, "cols": 2},
        {"name": "block", "rows": 4, "cols": 1},
        {"name": "gap", "rows": 2, "cols": 3},
        {"name": "planes", "rows": 1, "cols": 2},
    )
]
SHAPES = [(1, 1), (1, 7), (3, 5), (9, 1), (4, 8), (33, 35), (64, 32), (2, 3, 3, 5), (5, 2, 8), (1, 300)]
KINDS = ("empty", "full", "one", "last", "half", "rare", "patterned", "rows")


def example(shape, dtype, kind, seed=0):
    """Random bits of a type, so NaN, infinities and -0.0 too, where a mask of some kind does not make them zero."""
    random = np.random.default_rng(seed)
    numel = int(np.prod(shape))
    item = torch.empty(0, dtype=dtype).element_size()
    bits = random.integers(1, 256, (numel, item), dtype=np.uint8)
    if dtype is torch.bool:
        bits[:] = 1
    elif dtype.is_floating_point and numel > 2:
        bits[::3] = 0
        bits[::3, -1] = 0x80  # -0.0: not zero
    place = np.arange(numel)
    mask = {
        "empty": place < 0,
        "full": place >= 0,
        "one": place == 0,
        "last": place == numel - 1,
        "half": random.random(numel) < 0.5,
        "rare": random.random(numel) < 0.02,
        "patterned": (place % 5 == 1) & (random.random(numel) < 0.8),
        "rows": place // max(1, numel // shape[0]) % 2 == 0,
    }[kind]
    bits[~mask] = 0
    return torch.from_numpy(bits.reshape(-1)).view(dtype).view(shape)


def fitting(codec):
    """Pairs of tensors that the codec can hold and their sources."""
    for shape in SHAPES:
        for kind in KINDS:
            tensor = example(shape, torch.float16, kind)
            if codec.stored_bytes(Source(tensor)) is not None:
                yield tensor


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bits(a), as_bits(b))


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
@pytest.mark.parametrize("codec", VARIANTS, ids=str)
def test_codec_returns_every_bit(codec, dtype):
    held = 0
    every = dtype is torch.float16  # codecs see only widths, so for the others a selection will do
    for shape in SHAPES if every else SHAPES[2:8:2]:
        for kind in KINDS if every else KINDS[1::2]:
            source = Source(example(shape, dtype, kind))
            if codec.stored_bytes(source) is not None:
                entry, parts = pack(source, codec)
                assert same(decode(entry, parts), example(shape, dtype, kind)), (shape, kind)
                held += 1
    assert held >= 2


@pytest.mark.parametrize("codec", VARIANTS, ids=str)
def test_codec_writes_what_its_layout_says_under_known_suffixes(codec):
    for tensor in fitting(codec):
        entry, parts = pack(Source(tensor), codec)
        assert set(parts) <= set(SUFFIXES)
        found = {suffix: (DTYPE_NAMES[part.dtype], tuple(part.shape)) for suffix, part in parts.items()}
        assert found == {suffix: (part.dtype, part.shape) for suffix, part in layout(entry).items()}


@pytest.mark.parametrize("codec", VARIANTS, ids=str)
def test_codec_estimates_the_bytes_it_will_store(codec):
    for tensor in fitting(codec):
        _, parts = pack(Source(tensor), codec)
        stored = sum(part.nbytes for part in parts.values())
        estimated = codec.stored_bytes(Source(tensor))
        # Only deflate guesses: from a sample, at a faster level.
        assert abs(stored - estimated) <= (8 + 0.1 * estimated if codec.name == "deflate" else 0), tensor.shape


@pytest.mark.parametrize("codec", [codec for codec in VARIANTS if codec.name != "dense"], ids=str)
def test_codec_stores_values_in_one_dimension_under_the_key_itself(codec):
    for tensor in fitting(codec):
        _, parts = pack(Source(tensor), codec)
        assert parts[""].dim() == 1


def damages(parts, random):
    """Parts that are not the ones written."""
    for suffix, part in parts.items():
        flat = part.reshape(-1)
        others = {other: parts[other] for other in parts if other != suffix}
        yield others
        yield {**others, suffix: torch.cat([flat, flat[:1] if len(flat) else torch.zeros(1, dtype=flat.dtype)])}
        yield {**others, suffix: flat.to(torch.float64) if flat.dtype != torch.float64 else flat.to(torch.float32)}
        yield {**others, suffix: flat.view(-1, 1)}
        if len(flat):
            yield {**others, suffix: flat[:-1]}
        for _ in range(20 if len(flat) else 0):
            hurt = flat.clone()
            data = hurt.view(torch.uint8).numpy()
            data[random.integers(len(data), size=random.integers(1, 4))] = random.integers(256)
            yield {**others, suffix: hurt.view(part.shape)}
    yield {**parts, "_other": torch.zeros(1, dtype=torch.uint8)}


@pytest.mark.parametrize("codec", VARIANTS, ids=str)
def test_codec_returns_exactly_the_tensor_or_refuses_damaged_parts(codec):
    random = np.random.default_rng(1)
    refused = 0
    for tensor in fitting(codec):
        entry, parts = pack(Source(tensor), codec)
        for hurt in damages(parts, random):
            try:
                assert same(decode(entry, hurt), tensor)
            except CheckpointError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("codec", VARIANTS, ids=str)
def test_codec_returns_exactly_the_tensor_or_refuses_a_changed_entry(codec):
    for tensor in fitting(codec):
        entry, parts = pack(Source(tensor), codec)
        for changes in altered(entry):
            try:
                decoded = decode(dataclasses.replace(entry, **changes), parts)
            except CheckpointError:
                continue
            assert same(decoded, tensor), changes


def altered(entry):
    for step in (-1, 1):
        yield {"nonzeros": entry.nonzeros + step}
        yield {"shape": (entry.shape[0] + step, *entry.shape[1:])}
        for name in entry.options:
            yield {"options": {**entry.options, name: entry.options[name] + step}}
    yield {"shape": (*entry.shape, 2)}
    yield {"shape": (entry.numel,)}
    yield {"shape": (1, *entry.shape)}
    yield {"shape": entry.shape[::-1]}
    yield {"options": {**entry.options, "other": 1}}
    yield {"checksum": "crc32:00000000"}
    for name in CODECS:
        yield {"codec": name}


@pytest.mark.parametrize("codec", [codec for codec in VARIANTS if codec.name != "dense"], ids=str)
def test_codec_refuses_to_make_terabytes_of_a_few_bytes(codec):
    entry, parts = pack(Source(torch.zeros(60, 60)), codec)
    vast = dataclasses.replace(entry, shape=(60, 60 * 10**9))
    with pytest.raises(CheckpointError):
        decode(vast, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_stores_no_more_than_any_codec_that_decodes_fast(kind):
    tensor = example((256, 96), torch.float16, kind)
    sizes = {}
    for codec in VARIANTS:
        _, parts = encode(tensor, {"name": codec.name, **dataclasses.asdict(codec)})
        if not codec.only_smallest:
            sizes[codec] = sum(part.nbytes for part in parts.values())
    _, parts = encode(tensor)
    # Blocks of odd shapes are not tried, deflate is estimated, and next to no zeros are not worth packing.
    assert sum(part.nbytes for part in parts.values()) <= 1.01 * min(sizes.values()) + 64
