"""The format as others see it: a reader without hf_sparse agrees, and files of today are read for ever."""

import ast
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hf_sparse.formats.codecs import CODECS, DTYPE_NAMES, Source, pack
from hf_sparse.formats.codecs.base import as_bytes
from hf_sparse.formats.manifest import Manifest
from hf_sparse.formats.safetensors_io import MANIFEST_KEY, check_files, load_file, save_file
from scripts.tools import read_packed as reader

ROOT = Path(__file__).parents[2]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "format-1" / "every_codec.safetensors"
"""Written by `write_fixture` when the format was settled. Never write it anew: the point is that it is old."""


MODEL = FIXTURE.parent / "model"
"""A BERT of one layer in two shards, as `save_pretrained` of hf_sparse 0.1.0 wrote it. Never write it anew either."""

CRC32 = {
    "embeddings.word_embeddings.weight": "e079b5cd",
    "embeddings.position_embeddings.weight": "60a5d737",
    "embeddings.token_type_embeddings.weight": "b7571f16",
    "encoder.layer.0.attention.self.query.weight": "24ebf73b",
    "encoder.layer.0.attention.self.key.weight": "03ba48ad",
    "encoder.layer.0.attention.self.value.weight": "d39120ce",
    "encoder.layer.0.attention.output.dense.weight": "46eaf819",
    "encoder.layer.0.intermediate.dense.weight": "69b1c517",
    "encoder.layer.0.output.dense.weight": "5603e170",
    "pooler.dense.weight": "7b8f99e4",
}
"""Of the bytes of its matrices; its norms are all ones, and its biases all zeros."""


def pattern(dtype, shape=(6, 2, 5)):
    """Every fifth element or so, with all bits in use and at most one in five, so that every codec can hold it."""
    place = torch.arange(int(np.prod(shape)))
    kept = (place % 5 == 3) & (place % 7 != 0)
    item = torch.empty(0, dtype=dtype).element_size()
    values = (place[:, None] * 37 + torch.arange(item) * 101) % 255 + 1
    if dtype is torch.bool:
        values = torch.ones_like(values)
    return torch.where(kept[:, None], values, 0).to(torch.uint8).view(-1).view(dtype).view(shape)


SPECS: dict[str, Any] = {name: name for name in ("dense", "bitmask", "deflate", "csr", "gap", "planes", "2:4", "1:5")}
SPECS |= {f"{name} 4x3": {"name": name, "rows": 4, "cols": 3} for name in ("block", "gap", "planes")}


def every_codec():
    """Codec by name of tensor, and the tensors."""
    tensors = {(spec, name): pattern(dtype) for spec in SPECS for dtype, name in DTYPE_NAMES.items()}
    held = {key: CODECS.build(SPECS[key[0]]) for key in tensors}
    return {" ".join(key): codec for key, codec in held.items()}, {" ".join(key): tensors[key] for key in tensors}


def write_fixture(path):
    """Write a file in which every tensor is stored by the codec of its name, also where that is no gain."""
    from safetensors.torch import save_file as save_plain

    codecs, tensors = every_codec()
    entries, stored = {}, {}
    for key, tensor in tensors.items():
        entries[key], parts = pack(Source(tensor), codecs[key])
        stored.update({key + suffix: part for suffix, part in parts.items()})
    save_plain(stored, path, metadata={MANIFEST_KEY: Manifest(entries, generator="0.1.0").to_json()})


def data(array):
    return array.tobytes() if isinstance(array, np.ndarray) else as_bytes(array).tobytes()


def assert_same(found, tensors):
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        assert tuple(found[key].shape) == tuple(tensor.shape), key
        assert data(found[key]) == data(tensor), key


def test_reader_returns_every_bit_of_every_codec_and_type(tmp_path):
    write_fixture(tmp_path / "f")
    codecs, tensors = every_codec()
    assert {codec.name for codec in codecs.values()} == set(CODECS)
    assert_same(reader.read(tmp_path / "f"), tensors)


@pytest.mark.parametrize("codec", ["auto", "smallest"])
def test_reader_returns_what_was_saved(codec, tmp_path):
    tensors = {
        f"{density}": torch.where(torch.rand(96, 70) < density, torch.randn(96, 70), 0.0).half()
        for density in (0.0, 0.01, 0.1, 0.3, 0.6, 1.0)
    }
    tensors |= {"bias": torch.randn(5), "scalar": torch.tensor(2), "none": torch.zeros(0, 4)}
    tensors["blocks"] = torch.eye(4).repeat_interleave(32, 0).repeat_interleave(32, 1)
    save_file(tensors, tmp_path / "f", codec=codec)
    assert_same(reader.read(tmp_path / "f"), tensors)


def test_reader_finds_damage(tmp_path):
    save_file({"w": torch.eye(64)}, tmp_path / "f", codec="bitmask")
    data = bytearray((tmp_path / "f").read_bytes())
    data[-1] ^= 1
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(reader.FormatError):
        reader.read(tmp_path / "f")


def test_reader_is_short_and_needs_numpy_alone():
    text = (ROOT / "scripts" / "tools" / "read_packed.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy"}


def test_file_of_format_1_is_read_for_ever():
    # Later versions may add codecs and types to `every_codec`; those that the old file holds must stay what they were.
    loaded = load_file(FIXTURE)
    tensors = {key: tensor for key, tensor in every_codec()[1].items() if key in loaded}
    assert len(tensors) == 209
    assert all(loaded[key].dtype == tensor.dtype for key, tensor in tensors.items())
    assert_same(loaded, tensors)
    assert_same(reader.read(FIXTURE), tensors)


def test_model_of_format_1_is_read_for_ever():
    state = AutoModel.from_pretrained(MODEL).state_dict()
    digests = {key: f"{zlib.crc32(as_bytes(tensor).data):08x}" for key, tensor in state.items() if tensor.ndim > 1}
    assert digests == CRC32
    vectors = {key: tensor.unique().tolist() for key, tensor in state.items() if tensor.ndim == 1}
    assert vectors == {key: [1.0 if key.endswith("LayerNorm.weight") else 0.0] for key in vectors}
    assert len(state) == 23
    assert state["encoder.layer.0.attention.self.query.weight"].count_nonzero() == 32 * 32 / 2
    assert_same(reader.read(*sorted(MODEL.glob("*.safetensors"))), state)


def test_model_of_format_1_still_knows_what_it_was_asked_to_be():
    model = AutoModel.from_pretrained(MODEL)
    manifest = check_files(sorted(MODEL.glob("*.safetensors")))
    assert set(manifest.targets) == {key for key in CRC32 if key.startswith("encoder")}
    assert {manifest.tensors[key].codec for key in manifest.targets} == {"bitmask", "deflate", "gap", "block"}
    assert [group.sparsity for group in model.config.quantization_config.intent.groups] == [0.5, None, 0.75, 0.9]


def test_specification_names_every_codec_part_and_type():
    text = (ROOT / "hf_sparse" / "formats" / "FORMAT.md").read_text(encoding="utf-8")
    for name in CODECS:
        assert f"### `{name}`" in text
        for suffix in CODECS[name].suffixes:
            assert f"`<key>{suffix}`" in text
        for fact in CODECS[name].facts:
            assert f"`{fact}`" in text
    for name in DTYPE_NAMES.values():
        assert name in text
