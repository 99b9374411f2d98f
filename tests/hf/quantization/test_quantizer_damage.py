"""Damaged or mixed-up checkpoints: a CheckpointError, never a silently wrong model."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, BertForSequenceClassification
from transformers.distributed import DistributedConfig

from hf_sparse import BackendError, CheckpointError, RecipeError, SparseConfig
from tests.hf.quantization.packed_bert import QUERY, change_header, load


@pytest.mark.parametrize("sizes", [{"tp_size": 2, "tp_plan": "auto"}, {"fsdp_size": 2}])
def test_packed_weights_in_shards_are_refused(sizes: dict[str, Any], packed: Path) -> None:
    config = AutoConfig.from_pretrained(packed)
    config.distributed_config = DistributedConfig(**sizes)  # what from_pretrained does with tp_plan
    with pytest.raises(BackendError, match=r"backend 'auto' does not work on a model that is divided over processes"):
        load(packed, config=config, quantization_config=SparseConfig(backend="auto"))


# -- hostile ---------------------------------------------------------------------------------------------------------


def test_truncated_file_is_an_error(packed: Path) -> None:
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors"):
        load(packed)


def test_flipped_bit_anywhere_is_an_error(packed: Path) -> None:
    path = packed / "model.safetensors"
    whole = path.read_bytes()
    body = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(body, len(whole), (40,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(packed)
    path.write_bytes(whole)
    load(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), r"version 99 .* upgrade"),
        (lambda m: m["tensors"][QUERY].update(shape=[32, 33]), r"tensor .*self\.query\.weight"),
        (lambda m: m["tensors"][QUERY].update(shape=[64, 16]), r"tensor .*self\.query\.weight.*the checksum is"),
        (lambda m: m["tensors"][QUERY].update(nonzeros=101), r"tensor .*self\.query\.weight.*nonzeros"),
        (lambda m: m["tensors"][QUERY].update(checksum="crc32:00000000"), "checksum"),
        (lambda m: m["tensors"][QUERY].update(codec="../../etc"), "codec"),
        (lambda m: m["tensors"].pop(QUERY), "target"),
        (lambda m: (m["tensors"].pop(QUERY), m.update(targets=[])), "does not list"),
        (lambda m: m["tensors"][QUERY].update(shape=[2**40, 2**40]), "larger than"),
    ],
    ids=["newer", "size", "reshaped", "count", "checksum", "codec", "target", "unlisted", "huge"],
)
def test_wrong_manifest_is_an_error(change: Callable[[dict[str, Any]], None], message: str, packed: Path) -> None:
    change_header(packed, change)
    with pytest.raises(CheckpointError, match=message):
        load(packed)


def test_config_of_another_save_warns_and_the_files_are_what_counts(
    original: tuple[BertForSequenceClassification, Path], packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["manifest"]["tensors"][QUERY]["checksum"] = "crc32:00000000"
    (packed / "config.json").write_text(json.dumps(config))
    logging.getLogger("hf_sparse.hf.quantization.quantizer").addHandler(caplog.handler)
    assert torch.equal(load(packed).state_dict()[QUERY], original[0].state_dict()[QUERY])
    assert "config.json describes another save" in caplog.text


def test_shards_of_two_checkpoints_are_an_error(packed: Path, tmp_path: Path) -> None:
    loaded = load(packed)
    loaded.save_pretrained(packed, max_shard_size="8KB")
    with torch.no_grad():
        loaded.classifier.weight.add_(1)
    loaded.save_pretrained(tmp_path / "other", max_shard_size="8KB")
    first = sorted(packed.glob("model-*.safetensors"))[0].name
    shutil.copy(tmp_path / "other" / first, packed / first)
    with pytest.raises(CheckpointError, match="files of two checkpoints"):
        load(packed)


def test_missing_manifest_is_an_error(packed: Path) -> None:
    path = packed / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no hf_sparse manifest"):
        load(packed)


def test_missing_shard_is_an_error(packed: Path) -> None:
    load(packed).save_pretrained(packed, max_shard_size="8KB")
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    lost = index["weight_map"][QUERY]
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name != lost}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is a shard missing"):
        load(packed)


@pytest.mark.parametrize("spoilt", [{"intent": "x"}, {"manifest": [1]}])
def test_config_that_holds_something_else_is_refused(spoilt: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"`(intent|manifest)` must be a \w+ or a mapping .*, got ('x'|\[1\])"):
        SparseConfig.from_dict({"quant_method": "hf_sparse", **spoilt})
