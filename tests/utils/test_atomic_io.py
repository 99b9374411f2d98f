"""Files are replaced as a whole or not at all, and JSON is read without trust."""

import os
import stat

import pytest
import torch

from hf_sparse.errors import CheckpointError, SparsityError
from hf_sparse.formats.safetensors_io import save_file
from hf_sparse.utils.atomic_io import finish_replacing, read_json, replace_file, replace_files, write_text
from tests.helpers.limits import limited


def test_replaced_file_stays_whole_when_writing_fails(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def interrupted():
        with replace_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_replaced_file_is_the_new_one_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with replace_file(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="rights of files are those of POSIX")
def test_replaced_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with replace_file(tmp_path / "replaced") as temporary:
        temporary.write_bytes(b"new")
    save_file({"w": torch.eye(4)}, tmp_path / "saved")
    plain, replaced, saved = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "replaced", "saved"))
    assert plain == replaced == saved


def test_json_that_is_not_there_is_none_and_damage_is_an_error(tmp_path):
    assert read_json(tmp_path / "config.json") is None
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}
    for text, reason in (("{", "cannot read"), ("[1]", "must hold a mapping"), ("[" * 100_000, "cannot read")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            read_json(tmp_path / "config.json")


def test_json_of_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        limited(read_json, tmp_path / "config.json", seconds=5)


def test_text_goes_into_a_pipe_directly(tmp_path):
    read, write = os.pipe()
    write_text(f"/dev/fd/{write}", "text")
    assert os.read(read, 10) == b"text"
    for end in (read, write):
        os.close(end)


def test_folder_gets_all_files_at_the_end_the_named_one_last(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "other").write_text("other")
    order = []
    real = type(tmp_path).replace

    def watched(path, target):
        order.append(target.name)
        return real(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", watched)
    with replace_files(tmp_path, last="config.json") as staging:
        for name in ("config.json", "a", "z"):
            (staging / name).write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert order == ["a", "z", "config.json"]
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {
        "a": "new",
        "z": "new",
        "config.json": "new",
        "other": "other",
    }


def test_folder_stays_as_it_was_when_writing_fails(tmp_path):
    (tmp_path / "config.json").write_text("old")

    def interrupted():
        with replace_files(tmp_path) as staging:
            (staging / "config.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(SparsityError, match="it is a file, not a directory"), replace_files(tmp_path / "out"):
        pass


def test_stale_files_are_gone_before_the_last_file_is_new_and_by_whoever_goes_on(tmp_path, monkeypatch):
    for name in ("config.json", "old.bin", "kept.bin"):
        (tmp_path / name).write_text("old")

    def killed(path, missing_ok=False):
        raise KeyboardInterrupt

    def save():
        with replace_files(tmp_path, "config.json", stale=lambda fresh: ["old.bin"]) as staging:
            (staging / "config.json").write_text("new")
            (staging / "weights.bin").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            save()
    assert (tmp_path / "weights.bin").read_text() == "new"
    assert (tmp_path / "config.json").read_text() == "old"
    finish_replacing(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "kept.bin", "weights.bin"]
    assert (tmp_path / "config.json").read_text() == "new"
