"""Old files of compressed-tensors have no checksums: what contradicts itself is refused, before much is allocated."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from hf_sparse import CheckpointError
from hf_sparse.formats.compressed_tensors import decompress, find_compressed
from hf_sparse.formats.sharding import opened
from scripts.tools.fuzz_format import cut, flip, twist

LEGACY = Path(__file__).parents[1] / "fixtures" / "compressed-tensors-0.14"
FILES = {"bitmask": "sparse-bitmask/model-00001-of-00002.safetensors", "2:4": "sparse-24-bitmask/model.safetensors"}
DENSE = {"bitmask": "dense-bitmask/model.safetensors", "2:4": "dense-24/model.safetensors"}
FIRST_BYTES = torch.tensor([0, 1]), torch.tensor([0, 0])
"""Of the first two rows."""
PREFIX = "encoder.layer.0.attention.self.key"


def read(path):
    with opened([path]) as shards:
        found = find_compressed(shards.headers)
        return {prefix: decompress(prefix, parts, shards.get).clone() for prefix, parts in found.items()}


def changed(kind, tmp_path, **parts):
    """Write the file of a kind with other parts of one weight; None takes one away."""
    tensors = load_file(LEGACY / FILES[kind])
    for name, change in parts.items():
        part = change(tensors.pop(f"{PREFIX}.{name}"))
        if part is not None:
            tensors[f"{PREFIX}.{name}"] = part.contiguous()
    (tmp_path / "f.safetensors").write_bytes(save(tensors))
    return tmp_path / "f.safetensors"


@pytest.mark.parametrize("kind", FILES)
def test_weights_are_those_that_were_compressed(kind):
    dense = load_file(LEGACY / DENSE[kind])
    found = read(LEGACY / FILES[kind])
    assert len(found) >= 3
    for prefix, weight in found.items():
        assert weight.dtype == dense[f"{prefix}.weight"].dtype
        assert torch.equal(weight, dense[f"{prefix}.weight"])


def test_weight_by_hand():
    tensors = {
        "a.shape": torch.tensor([2, 10]),
        "a.bitmask": torch.tensor([[0b0000_0010, 0b10], [0, 0b01]], dtype=torch.uint8),
        "a.compressed": torch.tensor([5.0, 6.0, 7.0], dtype=torch.float16),
        "a.row_offsets": torch.tensor([0, 2]),
    }

    weight = _decompress(tensors)
    assert weight.tolist() == [[0, 5, 0, 0, 0, 0, 0, 0, 0, 6], [0, 0, 0, 0, 0, 0, 0, 0, 7, 0]]
    assert weight.dtype == torch.float16


def _decompress(tensors):
    from hf_sparse.formats.codecs import DTYPE_NAMES
    from hf_sparse.formats.safetensors_io import Stored

    headers = {key: Stored(DTYPE_NAMES[t.dtype], tuple(t.shape), t.nbytes) for key, t in tensors.items()}
    return decompress("a", find_compressed(headers)["a"], tensors.__getitem__)


@pytest.mark.parametrize(
    ("shape", "bitmask", "kept", "offsets"),
    [
        ([10], [3, 2], 3, 0),  # versions that compressed norms too
        ([2, 2, 3], [[[7], [0]], [[1], [2]]], 5, [[0, 0], [3, 0]]),  # offsets count along the first side alone
        ([0, 9], torch.zeros(0, 2), 0, torch.zeros(0)),
        ([3, 0], torch.zeros(3, 0), 0, [0, 0, 0]),
    ],
)
def test_weights_of_any_rank_are_read(shape, bitmask, kept, offsets):
    tensors = {
        "a.shape": torch.tensor(shape),
        "a.bitmask": torch.as_tensor(bitmask).to(torch.uint8),
        "a.compressed": torch.arange(1.0, kept + 1),
        "a.row_offsets": torch.as_tensor(offsets).to(torch.int64),
    }
    weight = _decompress(tensors)
    assert list(weight.shape) == shape
    assert weight[weight != 0].tolist() == list(range(1, kept + 1))


@pytest.mark.parametrize(
    ("kind", "parts", "reason"),
    [
        ("bitmask", {"shape": lambda t: None}, "lacks its part"),
        ("bitmask", {"bitmask": lambda t: None}, "lacks its part"),
        ("bitmask", {"row_offsets": lambda t: None}, r"its compressed should be \(36, 18\)"),
        ("bitmask", {"row_offsets": lambda t: t.int()}, "row_offsets is I32"),
        ("bitmask", {"row_offsets": lambda t: t + 1}, "row_offsets are not those"),
        ("bitmask", {"shape": lambda t: t.int()}, "shape is I32, and should be I64"),
        ("bitmask", {"shape": lambda t: t.new_zeros(0)}, "should be 1 to 32 numbers"),
        ("bitmask", {"shape": lambda t: t.new_ones(33)}, "should be 1 to 32 numbers"),
        ("bitmask", {"shape": lambda t: t.new_tensor([[36, 36]])}, "should be 1 to 32 numbers"),
        ("bitmask", {"shape": lambda t: t.new_tensor([36, -36])}, "no tensor can have the shape"),
        ("bitmask", {"shape": lambda t: t.new_tensor([2**40, 2**40])}, "no tensor can have the shape"),
        ("bitmask", {"shape": lambda t: t.new_tensor([2**20, 2**20])}, "its bitmask should be"),
        ("bitmask", {"shape": lambda t: t.new_tensor([0, 2**62])}, "no tensor can have the shape"),
        ("bitmask", {"compressed": lambda t: t[1:]}, "ones, and there are"),
        ("bitmask", {"compressed": lambda t: t[:, None]}, "its compressed should be"),
        ("bitmask", {"bitmask": lambda t: t.roll(1, 0)}, "row_offsets are not those"),
        ("bitmask", {"bitmask": lambda t: t.to(torch.int8)}, "bitmask is I8, and should be U8"),
        ("bitmask", {"bitmask": lambda t: t[:, :4]}, "its bitmask should be"),
        ("2:4", {"shape": lambda t: t.new_tensor([[1296]])}, "a matrix"),
        ("2:4", {"compressed": lambda t: t.view(-1)}, "its compressed should be"),
        ("2:4", {"bitmask": lambda t: t.flip(1)}, "bits behind the end of a row"),
        ("2:4", {"bitmask": lambda t: t.index_put(FIRST_BYTES, t.new_tensor([255, 0]))}, "in every row"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path, kind, parts, reason):
    with pytest.raises(CheckpointError, match=reason):
        read(changed(kind, tmp_path, **parts))


def test_weight_that_is_there_twice_is_refused(tmp_path):
    tensors = load_file(LEGACY / FILES["2:4"])
    (tmp_path / "f").write_bytes(save({**tensors, f"{PREFIX}.weight": torch.zeros(36, 36)}))
    with pytest.raises(CheckpointError, match="there twice"):
        read(tmp_path / "f")


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_refused_or_read_without_more_memory(kind, tmp_path):
    original = (LEGACY / FILES[kind]).read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]
    dice = random.Random(1)  # noqa: S311  repeatable, not secret
    ends = {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1200):
        head = json.loads(json.dumps(header))
        content = data
        if number % 4 == 0:
            twist(head, dice)
        elif number % 4 == 1:
            begin, end = head[f"{PREFIX}.shape"]["data_offsets"]  # sides of all sizes
            side = dice.choice((0, 1, 2**31, 2**45, 2**62, 2**63 - 1, 2**64 - 1, dice.randrange(100)))
            place = dice.choice((begin, end - 8))
            content = data[:place] + side.to_bytes(8, "little") + data[place + 8 :]
        else:
            content = dice.choice((flip, cut))(data, dice)
        text = json.dumps(head).encode()
        (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + content)
        try:
            weights = read(tmp_path / "f")
            assert all(weight.nbytes <= 8 * 8 * len(data) for weight in weights.values())
            ends["read"] += 1
        except CheckpointError:
            ends["refused"] += 1
    assert ends["refused"] > 500
    assert ends["read"] > 50  # values have no checksum
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
