"""Which files of a folder are those of a model: complete sets of shards, indexes and links that stay inside."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.inspection import inspect
from hf_sparse.formats.model_folder import check_index, check_link, check_one_folder, check_shards, weight_files
from hf_sparse.formats.safetensors_io import read_header, save_file
from tests.helpers.limits import command, limited


def shards(folder, total=5, name="model"):
    for number in range(1, total + 1):
        save_plain({f"w{number}": torch.ones(2, 2)}, folder / f"{name}-{number:05}-of-{total:05}.safetensors")
    return sorted(folder.glob(f"{name}-*.safetensors"))


@pytest.mark.parametrize("lost", [[1], [0], [4], [1, 2, 3, 4], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", ["model", "model.fp16", "adapter_model"])
def test_missing_shards_are_noticed_by_the_names_of_those_that_are_left(tmp_path, lost, name):
    files = shards(tmp_path, name=name)
    for index in lost:
        files[index].unlink()
    message = f"{5 - len(lost)} of 5 shards are there, and {name}-{lost[0] + 1:05}-of-00005.safetensors is missing"
    with pytest.raises(CheckpointError, match=message):
        inspect(tmp_path)


def test_complete_shards_and_one_shard_by_its_name_are_read(tmp_path):
    files = shards(tmp_path)
    shards(tmp_path, 2, "model.fp16")
    assert weight_files(tmp_path) == files
    assert len(inspect(tmp_path).tensors) == 7
    assert len(inspect(files[2]).tensors) == 1


def test_shards_of_several_checkpoints_or_without_a_place_are_refused(tmp_path):
    shards(tmp_path)
    shards(tmp_path, 2)
    with pytest.raises(CheckpointError, match="of several checkpoints, of 2 and 5 files"):
        weight_files(tmp_path)
    with pytest.raises(CheckpointError, match="no shard 3 of 2"):
        check_shards([tmp_path / f"a-{n:05}-of-00002.safetensors" for n in (1, 2, 3)])


def test_one_packed_shard_of_several_is_refused_whatever_it_is_called(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.eye(64), "b": torch.eye(64)}, whole, targets=["a"], codec="bitmask")
    stored = load_plain(whole)
    half = {key: stored[key] for key in ("a", "a_mask")}
    (tmp_path / "half").mkdir()
    save_plain(half, tmp_path / "half" / "model.safetensors", metadata=read_header(whole).metadata)
    assert len(inspect(tmp_path / "half" / "model.safetensors").tensors) == 1
    with pytest.raises(CheckpointError, match="lacks its part"):
        inspect(tmp_path / "half")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "a\\b", "..", "", "a\0b"])
def test_index_must_name_files_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="which is not a file of its folder"):
        check_index(tmp_path, exist=False)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"w": 1}}', "[]", "{"])
def test_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        check_index(tmp_path)


def test_index_of_a_missing_file_is_refused_where_it_would_be_published(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}')
    check_index(tmp_path, exist=False)
    with pytest.raises(CheckpointError, match="there is no such file"):
        check_index(tmp_path)


def test_files_of_two_folders_are_not_one_checkpoint():
    check_one_folder(["a/1.safetensors", "a/2.safetensors"])
    for other in ("a/../2.safetensors", "/a/2.safetensors", "2.safetensors"):
        with pytest.raises(CheckpointError, match="must be in one folder"):
            check_one_folder(["a/1.safetensors", other])


def test_link_may_lead_to_a_file_of_the_folder_or_to_the_blobs_of_its_snapshot(tmp_path):
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "0123", tmp_path / "models--a" / "blobs"
    for folder in (snapshot, blobs, snapshot / "below"):
        folder.mkdir(parents=True)
    for path in (blobs / "sha", snapshot / "plain", snapshot / "below" / "file", tmp_path / "secret"):
        path.write_text("x")
    for name, target in (("blob", "../../blobs/sha"), ("twin", "plain"), ("below/up", "file"), ("deep", "below/file")):
        (snapshot / name).symlink_to(target)
        check_link(snapshot / name)
    for name, target in (("out", "../../../secret"), ("absolute", str(tmp_path / "secret")), ("gone", "/nowhere/x")):
        (snapshot / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=r"is a link to .*, outside of its folder"):
            check_link(snapshot / name)
    (tmp_path / "linked").symlink_to(snapshot)
    check_link(tmp_path / "linked" / "plain")


def test_blobs_that_are_a_link_themselves_lead_out(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("secret")
    snapshot = tmp_path / "x" / "snapshots" / "y"
    snapshot.mkdir(parents=True)
    (tmp_path / "x" / "blobs").symlink_to(tmp_path / "home")
    (snapshot / "LICENSE").symlink_to("../../blobs/id_rsa")
    with pytest.raises(CheckpointError, match="outside of its folder"):
        check_link(snapshot / "LICENSE")


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
@pytest.mark.parametrize("verb", [["inspect"], ["card"], ["convert", "--format", "dense"]])
def test_pipe_is_not_waited_for(tmp_path, verb, name):
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / name)
    (folder / "config.json").write_text("{}")
    output = [tmp_path / "out"] if verb[0] == "convert" else []
    status, _, errors = limited(command, verb[0], folder, *output, *verb[1:], seconds=10)
    assert status == 2
    assert "not a regular file" in errors


def test_file_that_is_a_link_is_inspected(tmp_path):
    save_file({"a": torch.eye(64)}, tmp_path / "a.safetensors")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "model.safetensors").symlink_to(tmp_path / "a.safetensors")
    assert len(inspect(tmp_path / "link").tensors) == 1
    shutil.rmtree(tmp_path / "link")
