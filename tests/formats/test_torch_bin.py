"""`.bin` files: tensors come out, nothing is executed, and no file stands for more than it holds."""

from __future__ import annotations

import collections
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse import CheckpointError
from hf_sparse.formats.model_folder import pickled_files
from hf_sparse.formats.torch_bin import read_torch_bin
from tests.helpers.limits import limited

STATE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.tensor([1, 2]), "b": torch.tensor(3.5).half()}


def saved(path: Path, content: Any = None, **options: Any) -> Path:
    torch.save(STATE if content is None else content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, zipped: bool) -> None:
    found = read_torch_bin([saved(tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)])
    assert set(found.headers) == set(STATE)
    for key, tensor in STATE.items():
        assert found.get(key).equal(tensor)
        assert found.headers[key].shape == tuple(tensor.shape)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_state_dict_inside_the_checkpoint_of_a_loop_is_found(tmp_path: Path, key: str) -> None:
    content = {"epoch": 3, key: collections.OrderedDict(STATE), "lr": [0.1]}
    assert set(read_torch_bin([saved(tmp_path / "x.bin", content)]).headers) == set(STATE)


def test_transposed_and_expanded_views_come_out_contiguous(tmp_path: Path) -> None:
    position_ids = torch.arange(5).expand(1, -1)
    found = read_torch_bin([saved(tmp_path / "x.bin", {"t": STATE["a.weight"].t(), "p": position_ids})])
    assert found.get("t").equal(STATE["a.weight"].t())
    assert found.get("p").equal(position_ids)


def test_ties_are_found_by_their_bytes(tmp_path: Path) -> None:
    weight = torch.ones(4, 4)
    content = {"embed": weight, "head": weight, "other": weight.clone(), "part": weight[:2]}
    assert read_torch_bin([saved(tmp_path / "x.bin", content)]).ties() == {"head": "embed"}


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_pickle_that_would_execute_code_is_refused_and_nothing_is_executed(tmp_path: Path, zipped: bool) -> None:
    proof = tmp_path / "executed"
    content = {**STATE, "evil": Evil(proof)}
    path = saved(tmp_path / "x.bin", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="could run code"):
        read_torch_bin([path])
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the pickle does what it says: without protection it leaves its trace
    assert proof.exists()


def test_plain_pickle_is_refused(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Evil(proof)))
    with pytest.raises(CheckpointError, match="Nothing was executed"):
        read_torch_bin([tmp_path / "x.bin"])
    assert not proof.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_truncated_files_are_refused(tmp_path: Path, zipped: bool) -> None:
    whole = saved(tmp_path / "x.bin", _use_new_zipfile_serialization=zipped).read_bytes()
    for length in [0, 1, 10, *range(50, len(whole), max(1, len(whole) // 12))]:
        (tmp_path / "y.bin").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"y\.bin"):
            read_torch_bin([tmp_path / "y.bin"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": torch.zeros(1).as_strided((2**40,), (0,))}, "larger than the bytes"),
        ({f"{i}": torch.zeros(1 << 20)[:] for i in range(1)} | {"x": 3}, "tensors by name only"),
        ({3: torch.zeros(2)}, "tensors by name only"),
        ([torch.zeros(2)], "must hold a state dict"),
        ({"a": torch.eye(4).to_sparse()}, "only plain dense tensors"),
        (dict.fromkeys(map(str, range(40)), torch.zeros(1 << 16)), "many times its own size"),
    ],
)
def test_files_that_claim_more_or_other_things_are_refused(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_torch_bin([saved(tmp_path / "x.bin", content)])


def test_compressed_file_is_refused_before_it_expands(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"a": torch.zeros(1 << 20)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        read_torch_bin([tmp_path / "y.bin"])


def test_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="in two files"):
        read_torch_bin([saved(tmp_path / "x.bin"), saved(tmp_path / "y.bin")])


def test_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        pickled_files(tmp_path)


def damaged(path: Path, seeds: range) -> dict[str, int]:
    """In a process with limits: read files with flipped bytes, and count what became of them."""
    original = path.read_bytes()
    ends = {"read": 0, "refused": 0}
    for seed in seeds:
        dice = random.Random(seed)  # noqa: S311  repeatable, not secret
        content = bytearray(original)
        for _ in range(dice.choice((1, 4, 30))):
            content[dice.randrange(len(content))] = dice.randrange(256)
        other = path.with_name("damaged.bin")
        other.write_bytes(content)
        try:
            read_torch_bin([other])
            ends["read"] += 1
        except CheckpointError:
            ends["refused"] += 1
    return ends


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_damaged_files_are_read_or_refused_without_more_memory(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    ends = limited(damaged, path, range(200), megabytes=2048)
    assert ends["refused"] > 20
    assert sum(ends.values()) == 200


def test_reader_takes_a_file_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_torch_bin([tmp_path])


@pytest.mark.parametrize("state", [{}, {"a.weight": torch.ones(4, 4, device="meta")}], ids=["empty", "meta"])
def test_state_without_values_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no tensor|with values"):
        read_torch_bin([tmp_path / "pytorch_model.bin"])


def test_conjugate_view_is_resolved(tmp_path):
    values = torch.tensor([1 + 2j, 3 - 1j])
    torch.save({"a": values.conj()}, tmp_path / "pytorch_model.bin")
    found = read_torch_bin([tmp_path / "pytorch_model.bin"]).get("a")
    assert not found.is_conj()
    assert torch.equal(found, torch.tensor([1 - 2j, 3 + 1j]))


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_junk_is_said_to_be_junk(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"cannot read .*x\.bin: it is not a file of torch\.save, or is corrupted"
    ):
        read_torch_bin([path])
