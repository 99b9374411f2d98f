"""hf-sparse convert: the same bits in another format, from files alone, and never half an output."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_sparse import SparsityConfig, sparsify
from hf_sparse import import_checkpoint as convert
from hf_sparse.cli.main import main
from hf_sparse.formats.safetensors_io import load_file, read_manifest, save_file
from tests.helpers.training import bert, sparse_trainer
from tests.hf.conversion.contents import assert_same_bits, content, state

LEGACY = Path(__file__).parents[2] / "fixtures" / "compressed-tensors-0.14"
"""Written by compressed-tensors 0.14.0.1, see scripts/tools/make_compressed_tensors_fixture.py."""


MATRICES = 2 * 6


# -- dense to packed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["packed", "smallest"])
def test_dense_becomes_packed_and_loads_bit_identical(dense, tmp_path, format_):
    done = convert(dense, tmp_path / "packed", format_)
    assert (done.kind, done.packed) == ("dense", MATRICES)
    assert done.output_bytes < 0.5 * done.source_bytes
    assert_same_bits(state(tmp_path / "packed"), state(dense))


def test_dense_becomes_the_very_file_that_save_pretrained_writes(dense, tmp_path):
    convert(dense, tmp_path / "packed")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    for name in ("model.safetensors", "config.json"):
        assert content(tmp_path / "packed")[name] == content(tmp_path / "saved")[name]


def test_targets_are_the_matrices_with_zeros_but_no_embeddings(tmp_path):
    half = torch.eye(2).repeat(20, 20)
    few = torch.ones(40, 40)
    few[0] = 0.0
    names = {"a.weight": half, "b.weight": few, "word_embeddings.weight": half, "c.bias": half, "d.weight": half[0]}
    (tmp_path / "in").mkdir()
    save_plain({name: tensor.clone() for name, tensor in names.items()}, tmp_path / "in" / "model.safetensors")
    done = convert(tmp_path / "in", tmp_path / "out")
    assert done.manifest is not None
    assert done.manifest.targets == ("a.weight",)
    assert {key for key, entry in done.manifest.tensors.items() if entry.codec != "dense"} == {"a.weight"}


def test_small_files_are_copied_and_pickles_are_not(dense, tmp_path):
    done = convert(dense, tmp_path / "packed")
    names = set(content(tmp_path / "packed"))
    assert {"tokenizer.json", "tokenizer_config.json", "README.md", "config.json", "model.safetensors"} <= names
    assert not {"training_args.bin", "model.safetensors.index.json"} & names
    assert done.left == ("training_args.bin",)
    assert AutoTokenizer.from_pretrained(tmp_path / "packed")("the film is great")["input_ids"]


def test_links_out_of_the_folder_are_not_followed(dense, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (dense / "vocab.txt").unlink(missing_ok=True)
    (dense / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    done = convert(dense, tmp_path / "out")
    assert set(done.left) == {"training_args.bin", "vocab.txt"}
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_snapshot_in_the_cache_of_the_hub_is_read(dense, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    shutil.copytree(dense, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    convert(snapshot, tmp_path / "out")
    convert(dense, tmp_path / "expected")
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_old_names_that_transformers_renames_still_load(dense, tmp_path):
    file = dense / "model.safetensors"
    new, old = ("LayerNorm.weight", "LayerNorm.bias"), ("LayerNorm.gamma", "LayerNorm.beta")
    tensors = {key.replace(new[0], old[0]).replace(new[1], old[1]): part for key, part in load_plain(file).items()}
    tensors = {key: part + 0.5 if "LayerNorm" in key else part for key, part in tensors.items()}
    save_plain(tensors, file, metadata={"format": "pt"})
    convert(dense, tmp_path / "packed")
    assert_same_bits(state(tmp_path / "packed"), state(dense))
    assert state(dense)["bert.embeddings.LayerNorm.weight"].unique().tolist() == [1.5]


def test_a_tensor_with_the_name_of_a_part_keeps_its_name(tmp_path):
    eye = torch.eye(64)
    (tmp_path / "in").mkdir()
    save_plain({"a.weight": eye, "a.weight_mask": torch.ones(2)}, tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "out", codec="csr")
    convert(tmp_path / "out", tmp_path / "again", codec="bitmask")
    for name, codec in (("out", "csr"), ("again", "dense")):
        loaded = load_file(tmp_path / name / "model.safetensors")
        assert loaded["a.weight"].equal(eye)
        assert loaded["a.weight_mask"].equal(torch.ones(2))
        manifest = read_manifest(tmp_path / name / "model.safetensors")
        assert manifest is not None
        assert manifest.tensors["a.weight"].codec == codec


# -- from packed -----------------------------------------------------------------------------------------------------


def test_packed_becomes_dense_again_to_the_bit(dense, tmp_path):
    convert(dense, tmp_path / "packed")
    done = convert(tmp_path / "packed", tmp_path / "back", "dense")
    assert (done.kind, done.packed, done.manifest) == ("packed", 0, None)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert_same_bits(load_plain(tmp_path / "back" / "model.safetensors"), load_plain(dense / "model.safetensors"))
    assert_same_bits(state(tmp_path / "back"), state(dense))


def test_packed_takes_another_profile_codec_and_sharding_and_comes_back(dense, tmp_path):
    sparsify(bert(), SparsityConfig(sparsity=0.8)).save_pretrained(tmp_path / "a")
    asked = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["intent"]
    convert(tmp_path / "a", tmp_path / "b", "smallest", max_shard_size="8KB")
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(read_manifest(shard) == read_manifest(shards[0]) for shard in shards)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["intent"] == asked
    assert_same_bits(state(tmp_path / "b"), state(tmp_path / "a"))
    csr = convert(tmp_path / "b", tmp_path / "c", codec="csr")
    assert csr.manifest is not None
    assert {csr.manifest.tensors[key].codec for key in csr.manifest.targets} == {"csr"}
    convert(tmp_path / "c", tmp_path / "d")
    assert content(tmp_path / "d")["model.safetensors"] == content(tmp_path / "a")["model.safetensors"]
    assert content(tmp_path / "d")["config.json"] == content(tmp_path / "a")["config.json"]


def test_dense_takes_another_sharding(dense, tmp_path):
    convert(dense, tmp_path / "shards", "dense", max_shard_size=20_000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 25_000 for shard in shards)
    assert all(shard.stat().st_mode & 0o777 == 0o666 & ~_umask() for shard in shards)
    assert_same_bits(state(tmp_path / "shards"), state(dense))


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_checkpoint_of_a_trainer_becomes_the_masked_model(tmp_path):
    trainer = sparse_trainer(tmp_path / "run", save_strategy="steps", save_steps=10)
    trainer.train()
    source = tmp_path / "run" / "checkpoint-10"
    for format_ in ("packed", "dense"):
        convert(source, tmp_path / format_, format_)
        assert not any(key.endswith("_hidden") for key in load_plain(tmp_path / format_ / "model.safetensors"))
        assert_same_bits(state(tmp_path / format_), state(source))


# -- compressed-tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dense_name", "dtype"),
    [("sparse-bitmask", "dense-bitmask", torch.float32), ("sparse-24-bitmask", "dense-24", torch.bfloat16)],
)
def test_compressed_tensors_loads_bit_identical_to_its_dense_model(name, dense_name, dtype, tmp_path):
    done = convert(LEGACY / name, tmp_path / "packed")
    assert (done.kind, done.packed) == ("compressed-tensors", 7)  # six matrices of the layer, and the pooler
    expected = state(LEGACY / dense_name, AutoModel)
    assert expected["pooler.dense.weight"].dtype == dtype
    assert_same_bits(state(tmp_path / "packed", AutoModel), expected)
    assert done.manifest is not None
    assert "pooler.dense.weight" in done.manifest.targets
    assert len(done.manifest.targets) == 7
    convert(LEGACY / name, tmp_path / "plain", "dense")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same_bits(state(tmp_path / "plain", AutoModel), expected)


def test_compressed_tensors_of_a_single_file_is_told_by_its_keys(tmp_path):
    convert(LEGACY / "sparse-24-bitmask" / "model.safetensors", tmp_path / "out.safetensors")
    expected = load_plain(LEGACY / "dense-24" / "model.safetensors")
    assert_same_bits(load_file(tmp_path / "out.safetensors"), expected)


def test_compression_config_of_older_versions_is_read(tmp_path):
    folder = shutil.copytree(LEGACY / "sparse-24-bitmask", tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = {"sparsity_config": config.pop("quantization_config")["sparsity_config"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert convert(folder, tmp_path / "out").packed == 7
    assert "compression_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


# -- input, output, options ------------------------------------------------------------------------------------------


def test_single_file_becomes_a_single_file(tmp_path):
    tensors = {"a.weight": torch.eye(64), "a.bias": torch.arange(3)}
    save_plain(tensors, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "packed.safetensors")
    save_file(tensors, tmp_path / "saved.safetensors", targets=["a.weight"])
    assert (tmp_path / "packed.safetensors").stat().st_size == (tmp_path / "saved.safetensors").stat().st_size
    assert_same_bits(load_file(tmp_path / "packed.safetensors"), tensors)
    convert(tmp_path / "packed.safetensors", tmp_path / "dense.safetensors", "dense")
    assert_same_bits(load_plain(tmp_path / "dense.safetensors"), tensors)
    assert not list(tmp_path.glob(".*"))


def test_command_line_converts_and_says_what_it_did(dense, tmp_path, capsys):
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--codec", "2:4", "--max-shard-size", "1MB"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "dense: " in text
    assert "not copied: training_args.bin" in text
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_a_tensor_that_is_only_called_like_training_state_stays(tmp_path):
    eye = torch.eye(64)
    (tmp_path / "in").mkdir()
    save_plain({"a.weight": eye, "a.weight_hidden": torch.ones(2)}, tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again", format="dense")
    assert load_plain(tmp_path / "again" / "model.safetensors")["a.weight_hidden"].equal(torch.ones(2))
