from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file as save_plain

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.inspection import inspect
from hf_sparse.formats.safetensors_io import save_file


@pytest.fixture
def packed(tmp_path):
    """A file with one packed weight with 8 of 64 entries kept, one dense weight and a bias."""
    weight = torch.zeros(8, 8)
    weight[:, 0] = 1.0
    tensors = {"a.weight": weight, "b.weight": torch.ones(2, 4), "a.bias": torch.zeros(8)}
    save_file(tensors, tmp_path / "model.safetensors", targets=["a.weight"], codec="bitmask")
    return tmp_path / "model.safetensors"


def test_inspect_lists_targets_as_weights_and_the_rest_as_others(packed):
    inspection = inspect(packed)
    assert inspection.packed
    (weight,) = inspection.weights
    assert (weight.name, weight.codec, weight.shape, weight.dtype) == ("a.weight", "bitmask", (8, 8), "F32")
    assert weight.sparsity == 1 - 8 / 64
    assert weight.stored_bytes == 64 // 8 + 8 * 4
    assert weight.dense_bytes == 64 * 4
    assert {tensor.name for tensor in inspection.others} == {"b.weight", "a.bias"}


def test_inspect_sums_stored_bytes_to_what_the_file_holds(packed):
    content = packed.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert sum(tensor.stored_bytes for tensor in inspect(packed).tensors) == len(content) - header


def test_inspect_says_how_small_the_weights_are(packed):
    assert inspect(packed).size_line() == "0.0 kB, 0.1562 of dense fp32 (0.3 kB)"
    assert inspect(packed).size_line({"b.weight"}).endswith("of dense fp32 (0.0 kB)")


def test_inspect_reads_one_folder_as_it_reads_one_file(packed):
    assert inspect(packed.parent) == inspect(packed)


def test_inspect_prints_every_weight_and_totals(packed):
    text = str(inspect(packed))
    assert "No manifest" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("a.weight"))
    assert row.split() == ["a.weight", "bitmask", "8x8", "F32", "87.50%", "0.0", "kB", "0.3", "kB", "0.156"]
    assert f"model.safetensors: {packed.stat().st_size / 1e3:.1f} kB" in text


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint16]
    + [torch.uint32, torch.uint64, torch.bool, torch.complex64],
)
def test_inspect_counts_zeros_of_every_type(tmp_path, dtype):
    save_plain({"weight": torch.tensor([[0.0, 1.0], [0.0, 1.0]]).to(dtype)}, tmp_path / "a.safetensors")
    (weight,) = inspect(tmp_path / "a.safetensors").tensors
    assert (weight.codec, weight.nonzeros, weight.sparsity) == ("plain", 2, 0.5)


def test_inspect_counts_minus_zero_as_zero(tmp_path):
    save_plain({"weight": torch.tensor([[-0.0, 1.0]], dtype=torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    assert inspect(tmp_path).tensors[0].nonzeros == 1


def test_inspect_lists_plain_files_beside_packed_ones(packed):
    save_plain({"adapter": torch.ones(2, 2)}, packed.parent / "adapter.safetensors")
    inspection = inspect(packed.parent)
    assert {tensor.name: tensor.codec for tensor in inspection.others}["adapter"] == "plain"
    assert [tensor.name for tensor in inspection.weights] == ["a.weight"]


def test_inspect_refuses_a_manifest_that_contradicts_the_file(packed):
    _change_manifest(packed, lambda manifest: manifest["tensors"]["a.weight"].update(nonzeros=9))
    with pytest.raises(CheckpointError, match=r"'a\.weight' must be F32 of shape \(9,\)"):
        inspect(packed)


def test_inspect_refuses_a_manifest_from_a_newer_version(packed):
    _change_manifest(packed, lambda manifest: manifest.update(version=2))
    with pytest.raises(CheckpointError, match="version 2 of the format"):
        inspect(packed)


def _change_manifest(path, change):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["hf_sparse"])
    change(manifest)
    header["__metadata__"]["hf_sparse"] = json.dumps(manifest)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])


EVIL = "a.\x1b]0;owned\x07\r\x9b2J\u202eweight"


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "a\x1b[2J.safetensors"
    save_file({EVIL: torch.eye(64), "b": torch.ones(2)}, path, targets=[EVIL])
    text = str(inspect(path))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "a.\\x1b]0;owned\\x07" in text
    head, line, row = text.splitlines()[:3]
    assert len({len(part) for part in (head, line, row)}) == 1
    assert inspect(path).to_dict()["tensors"][0]["name"] == EVIL


def test_control_characters_in_names_do_not_reach_the_terminal_by_an_error(tmp_path):
    save_file({EVIL: torch.eye(64)}, tmp_path / "a.safetensors", targets=[EVIL], codec="bitmask")
    _change_manifest(tmp_path / "a.safetensors", lambda manifest: manifest["tensors"][EVIL].update(nonzeros=63))
    with pytest.raises(CheckpointError) as refused:
        inspect(tmp_path)
    assert all(character.isprintable() for character in str(refused.value))
