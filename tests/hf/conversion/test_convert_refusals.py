"""What conversion refuses, and what it leaves whole."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file as save_plain

import hf_sparse.formats.sharding
from hf_sparse import CheckpointError, RecipeError, SparsityConfig, compact, sparsify
from hf_sparse import import_checkpoint as convert
from hf_sparse.formats.safetensors_io import settle_header
from tests.helpers.training import bert
from tests.hf.conversion.contents import assert_same_bits, content, state


def test_damage_is_found_and_nothing_is_written(dense, tmp_path):
    convert(dense, tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"tensor 'bert.* does not hold exactly"):
        convert(tmp_path / "packed", tmp_path / "out", "dense")
    assert content(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantized \(gptq\)"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "marlin-24"}}, "'marlin-24'"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}, "not only sparse"),
        ([1], "should be a mapping"),
    ],
)
def test_what_is_stored_otherwise_is_refused(dense, tmp_path, stated, reason):
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    with pytest.raises(CheckpointError, match=reason):
        convert(dense, tmp_path / "out")


def test_output_that_is_the_source_is_refused(dense, tmp_path):
    (tmp_path / "link").symlink_to(dense)
    before = content(dense)
    for output in (dense, tmp_path / "link", dense / ".." / "dense"):
        with pytest.raises(RecipeError, match="is the source itself"):
            convert(dense, output)
    file = dense / "model.safetensors"
    os.link(file, tmp_path / "hard.safetensors")
    with pytest.raises(RecipeError, match="is the source itself"):
        convert(file, tmp_path / "hard.safetensors")
    with pytest.raises(RecipeError, match="is a folder"):
        convert(file, tmp_path)
    assert content(dense) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_conversion_leaves_the_old_output_whole(dense, tmp_path, monkeypatch, interruption):
    convert(dense, tmp_path / "out", max_shard_size="20KB")
    before = content(tmp_path / "out")
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise interruption("no space left")
        settle_header(*arguments)

    monkeypatch.setattr(hf_sparse.formats.sharding, "settle_header", interrupted)
    with pytest.raises(interruption):
        convert(dense, tmp_path / "out", "dense", max_shard_size="20KB")
    assert content(tmp_path / "out") == before


def test_output_has_no_weights_of_an_earlier_one(dense, tmp_path):
    convert(dense, tmp_path / "out", "dense", max_shard_size="20KB")
    convert(dense, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_missing_shard_of_a_dense_model_is_found(dense, tmp_path):
    convert(dense, tmp_path / "shards", "dense", max_shard_size="20KB")
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="the checkpoint is not complete: 4 of 5 shards"):
        convert(tmp_path / "shards", tmp_path / "out")


def test_folder_with_several_models_asks_which(tmp_path):
    for name in ("a", "b"):
        save_plain({"weight": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="must hold one model"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"format": "zip"}, "`format` must be one of 'packed', 'smallest', 'dense', got 'zip'"),
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"codec": "dense"}, "use format 'dense'"),
        ({"codec": "csr", "format": "dense"}, "goes with format 'packed'"),
        ({"max_shard_size": "much"}, "size of a shard"),
        ({"max_shard_size": 0}, "size of a shard"),
    ],
)
def test_options_that_cannot_be_are_refused(dense, tmp_path, options, reason):
    with pytest.raises(RecipeError, match=reason):
        convert(dense, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_compacted_checkpoint_is_not_written_dense(tmp_path):
    model = sparsify(bert(), SparsityConfig(sparsity=0.5, pattern="head"))
    compact(model)
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    with pytest.raises(RecipeError, match="a compacted model cannot be written dense"):
        convert(tmp_path / "small", tmp_path / "out", format="dense")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"old"
    convert(tmp_path / "small", tmp_path / "smallest", format="smallest")
    assert_same_bits(state(tmp_path / "smallest"), state(tmp_path / "small"))


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "wide"), ("num_hidden_layers", [2]), ("num_attention_heads", None)]
)
def test_compacting_with_wrong_types_in_the_config_is_refused(dense, tmp_path, key, value):
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(dense, tmp_path / "out", compact=True)
    assert not any((tmp_path / "out").glob("*"))


def test_source_that_is_no_path_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="the source must be a folder, a file or a Hub name, got None"):
        convert(None, tmp_path / "out")  # type: ignore[arg-type]
