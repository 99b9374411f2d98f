"""Files: checked before they are loaded, and never half written."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file as save_plain

from hf_sparse.errors import CheckpointError, SparsityError
from hf_sparse.formats import inspection
from hf_sparse.formats.codecs import CODECS, encode
from hf_sparse.formats.inspection import inspect
from hf_sparse.formats.manifest import Manifest
from hf_sparse.formats.safetensors_io import (
    MANIFEST_KEY,
    check_files,
    load_file,
    read_header,
    read_manifest,
    save_file,
)
from tests.helpers.limits import limited

PACKED = "encoder.weight"


def example():
    weight = torch.where(torch.rand(64, 96) < 0.3, torch.rand(64, 96) + 1, 0.0).half()
    return {PACKED: weight, "encoder.bias": torch.randn(64), "step": torch.tensor(7), "none": torch.zeros(0, 3)}


@pytest.fixture
def path(tmp_path):
    save_file(example(), tmp_path / "model.safetensors", targets=[PACKED])
    return tmp_path / "model.safetensors"


def parts_of(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def rewrite(path, change=None, manifest=None, metadata=None):
    """Write the file again with other parts or another manifest."""
    parts, old = parts_of(path)
    parts = {key: part.clone() for key, part in parts.items()}
    if change:
        change(parts)
    data = json.loads(old[MANIFEST_KEY])
    if manifest:
        manifest(data)
    save_plain(parts, path, metadata={MANIFEST_KEY: json.dumps(data)} if metadata is None else metadata)


def test_file_round_trips_every_tensor(path):
    torch.manual_seed(0)
    expected, found = example(), load_file(path)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)


@pytest.mark.parametrize("codec", [*CODECS])
def test_file_round_trips_whatever_the_codec(codec, tmp_path):
    tensors = {"w": torch.eye(64).half(), "b": torch.ones(3)}
    manifest = save_file(tensors, tmp_path / "f", codec=codec)
    assert (manifest.tensors["w"].codec, manifest.tensors["b"].codec) == (codec, "dense")
    assert torch.equal(load_file(tmp_path / "f")["w"], tensors["w"])


def test_file_has_one_dimensional_values_under_the_original_key(path):
    _, tensors = read_header(path)
    assert len(tensors[PACKED].shape) == 1
    assert tensors[PACKED].dtype == "F16"


def test_file_is_the_same_bytes_when_written_again(path, tmp_path):
    save_file(load_file(path), tmp_path / "again", targets=[PACKED])
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_file_keeps_a_tensor_dense_when_a_part_would_take_the_name_of_another(tmp_path):
    tensors = {"w": torch.eye(64), "w_mask": torch.ones(2), "w_gaps": torch.ones(2), "w_blocks": torch.ones(2)}
    tensors |= {"w_mask_deflated": torch.ones(1), "w_columns": torch.ones(1), "w_positions": torch.ones(1)}
    assert save_file(tensors, tmp_path / "f").tensors["w"].codec == "dense"
    assert torch.equal(load_file(tmp_path / "f")["w_gaps"], torch.ones(2))


def test_header_tells_types_shapes_and_sizes_without_reading_tensors(path):
    metadata, tensors = read_header(path)
    assert metadata["format"] == "pt"
    assert tensors["encoder.bias"] == ("F32", (64,), 256)
    assert tensors["step"] == ("I64", (), 8)
    assert tensors["none"] == ("F32", (0, 3), 0)


def test_manifest_is_none_when_another_program_wrote_the_file(tmp_path):
    save_plain({"a": torch.ones(2)}, tmp_path / "f")
    assert read_manifest(tmp_path / "f") is None
    with pytest.raises(CheckpointError, match="no hf_sparse manifest"):
        check_files(tmp_path / "f")


def test_manifest_lists_every_tensor_and_the_targets(path):
    manifest = read_manifest(path)
    assert manifest is not None
    assert set(manifest.tensors) == set(example())
    assert manifest.targets == (PACKED,)
    assert manifest == check_files([path], manifest)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, -100, -1])
def test_truncated_file_is_refused(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    for read in (read_header, read_manifest, check_files, load_file):
        with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
            read(path)


def test_longer_file_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_file(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*nothing.safetensors"):
        load_file(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="no files"):
        check_files([])


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9])
def test_header_that_is_longer_than_the_file_is_refused(path, length):
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(path)


def with_offsets(path, change):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["encoder.bias"].update(data_offsets=[0, 256]),
        lambda h: h["encoder.bias"].update(data_offsets=[256, 0]),
        lambda h: h["encoder.bias"].update(shape=[65]),
        lambda h: h["encoder.bias"].update(shape=[2**62, 2**62]),
        lambda h: h["encoder.bias"].update(dtype="F4"),
        lambda h: h["encoder.bias"].update(dtype="X9"),
        lambda h: h.pop("encoder.bias"),
    ],
)
def test_header_with_wrong_offsets_types_or_shapes_is_refused(path, change):
    with_offsets(path, change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: p.pop(PACKED), "lacks its part"),
        (
            lambda p: p.pop(f"{PACKED}_mask_deflated"),
            "lacks its part 'encoder.weight_mask_deflated'; is a shard missing",
        ),
        (lambda p: p.update(other=torch.ones(1)), "does not list 'other'"),
        (lambda p: p.update({PACKED: p[PACKED][1:].clone()}), "must be F16 of shape"),
        (lambda p: p.update({PACKED: p[PACKED].bfloat16()}), "must be F16 of shape"),
        (lambda p: p.update({PACKED: p[PACKED].view(1, -1)}), "must be F16 of shape"),
        (lambda p: p.update({"encoder.bias": torch.randn(8, 8)}), "'encoder.bias' must be F32 of shape"),
        (lambda p: p["encoder.bias"].neg_(), r"'encoder.bias' \(codec dense\): the content is corrupted"),
    ],
)
def test_parts_that_the_manifest_does_not_demand_are_refused(path, change, complaint):
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=complaint):
        check_files(path)


def test_packed_content_is_verified_when_it_is_decoded(path):
    rewrite(path, lambda parts: parts[PACKED].neg_())
    check_files(path)
    with pytest.raises(CheckpointError, match=r"'encoder.weight' \(codec deflate\): the content is corrupted"):
        load_file(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.update(version=2), "model.safetensors: the checkpoint is in version 2"),
        (lambda m: m["tensors"][PACKED].update(codec="zip"), "unknown codec"),
        (lambda m: m["tensors"][PACKED].update(shape=[64, 97]), "does not hold exactly 776 bytes"),
        (lambda m: m["tensors"][PACKED].update(shape=[96, 64]), "the content is corrupted"),
        (lambda m: m["tensors"][PACKED].update(shape=[2**20, 2**20]), "more than 1024 times as many"),
        (lambda m: m["tensors"]["encoder.bias"].update(nonzeros=63), "says 63 nonzeros"),
        (lambda m: m["tensors"].pop("encoder.bias"), "does not list 'encoder.bias'"),
        (lambda m: m["tensors"].update(v=m["tensors"]["encoder.bias"]), "lacks its part 'v'"),
    ],
)
def test_manifest_that_does_not_fit_its_files_is_refused(path, change, complaint):
    rewrite(path, manifest=change)
    with pytest.raises(CheckpointError, match=complaint):
        load_file(path)


def test_manifest_whose_entries_share_a_part_is_refused(tmp_path):
    entry, parts = encode(torch.eye(64), "bitmask")
    mask, _ = encode(parts["_mask"], "dense")
    manifest = Manifest({"w": entry, "w_mask": mask})
    stored = {"w" + suffix: part for suffix, part in parts.items()}
    save_plain(stored, tmp_path / "f", metadata={MANIFEST_KEY: manifest.to_json()})
    with pytest.raises(CheckpointError, match="'w_mask' would have to hold both 'w_mask' and 'w'"):
        check_files(tmp_path / "f")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10_000, '{"version":1}'])
def test_manifest_that_is_no_manifest_is_refused_with_the_name_of_the_file(path, text):
    rewrite(path, metadata={MANIFEST_KEY: text})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        read_manifest(path)


def shards(path, tmp_path):
    parts, metadata = parts_of(path)
    names = sorted(parts)
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file, keys in zip(files, (names[::2], names[1::2]), strict=True):
        save_plain({key: parts[key] for key in keys}, file, metadata=metadata)
    return files


def test_shards_are_checked_together(path, tmp_path):
    first, second = shards(path, tmp_path)
    assert check_files([second, first]) == read_manifest(path)
    with pytest.raises(CheckpointError, match="is a shard missing"):
        check_files([first])
    with pytest.raises(CheckpointError, match="a file is listed twice"):
        check_files([first, second, first])
    copy = shutil.copyfile(first, tmp_path / "copy.safetensors")
    with pytest.raises(CheckpointError, match=r"is in two files: .*1.safetensors and .*copy.safetensors"):
        check_files([first, second, copy])


def test_shards_of_two_checkpoints_are_refused(path, tmp_path):
    first, second = shards(path, tmp_path)
    rewrite(second, manifest=lambda m: m.update(targets=[]))
    with pytest.raises(CheckpointError, match=r"2.safetensors has another manifest than .*1.safetensors"):
        check_files([first, second])


def test_manifest_of_the_config_must_be_the_one_of_the_files(path):
    other = dataclasses.replace(check_files(path), generator="other")
    with pytest.raises(CheckpointError, match=r"another manifest than config.json"):
        check_files(path, other)


def test_save_leaves_the_old_file_when_a_tensor_cannot_be_stored(path):
    old = path.read_bytes()
    with pytest.raises(CheckpointError, match="complex128"):
        save_file({"w": torch.zeros(2, dtype=torch.complex128)}, path)
    with pytest.raises(CheckpointError, match="target 'v' is not among"):
        save_file({"w": torch.zeros(2)}, path, targets=["v"])
    assert path.read_bytes() == old


@pytest.mark.parametrize("shape", [[0, 2**63], [2**64 - 1, 0], [0, 2**62, 4]])
def test_shape_that_no_tensor_can_have_is_refused_also_without_elements(shape, tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="'w' has a shape that no tensor can have"):
        read_header(path)


def write_header(path, text, data=b""):
    content = text.encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ('{"w": ENTRY, "v": ENTRY2, "w": ENTRY}', "w"),
        ('{"__metadata__": {"hf_sparse": "{}", "hf_sparse": "{}"}, "w": ENTRY}', "hf_sparse"),
        ('{"__metadata__": {}, "__metadata__": {}, "w": ENTRY}', "__metadata__"),
        ('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "shape": [1]}}', "shape"),
    ],
)
def test_header_that_names_a_key_twice_is_refused(header, key, tmp_path):
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = header.replace("ENTRY2", entry.replace("[0, 4]", "[4, 8]")).replace("ENTRY", entry)
    path = tmp_path / "model.safetensors"
    write_header(path, header, bytes(8 if "[4, 8]" in header else 4))
    for read in (read_header, read_manifest, check_files, load_file):
        with pytest.raises(CheckpointError, match=f"its header names the key '{key}' twice|cannot read"):
            read(path)


def test_headers_are_read_and_manifests_parsed_once(tmp_path, monkeypatch):
    save_file({f"layer.{n}.weight": torch.eye(8) for n in range(20)}, tmp_path / "model.safetensors", codec="bitmask")
    calls: list[str] = []
    monkeypatch.setattr(Manifest, "from_json", watched(Manifest.from_json, calls))
    monkeypatch.setattr(inspection, "read_header", watched(read_header, calls))
    str(inspect(tmp_path))
    assert len(calls) == 2


def watched(function, calls):
    def call(*arguments):
        calls.append(function.__name__)
        return function(*arguments)

    return call


def inspected(path):
    return str(inspect(path)).count("\n")


@pytest.mark.parametrize("codec", ["bitmask", "dense"])
def test_file_of_many_entries_is_inspected_in_bounded_time(tmp_path, codec):
    path = tmp_path / "model.safetensors"
    eye = torch.eye(4)
    entry, parts = encode(eye, codec)
    count = 32_000
    keys = [f"model.layers.{n}.weight" for n in range(count)]
    stored = {key + suffix: part.clone() for key in keys for suffix, part in parts.items()}
    manifest = Manifest(dict.fromkeys(keys, entry), targets=tuple(keys))
    save_plain(stored, path, metadata={MANIFEST_KEY: manifest.to_json()})
    assert limited(inspected, path, seconds=30, megabytes=2048) > count


def save_much(folder):
    return save_file({"w": torch.rand(64, 64)}, folder / "model.safetensors")


def test_full_disk_is_an_error_in_words_and_leaves_the_old_file(tmp_path):
    save_file({"w": torch.eye(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SparsityError, match=r"cannot write .*model.safetensors: .*The old files are unchanged"):
        limited(save_much, tmp_path, file_bytes=1000)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
