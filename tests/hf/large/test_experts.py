"""Stacked experts pruned from file to file: what the model in memory gives, whatever form the files have."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, sparsify, sparsify_checkpoint
from hf_sparse.formats.inspection import inspect
from tests.helpers import mixtures
from tests.helpers.killed import sparsify_killed

TARGETS = ["*_proj", "*.experts"]
GROUPS: dict[str, dict[str, Any]] = {
    "wanda": {"scorer": "wanda", "sparsity": 0.5},
    "sparsegpt 2:4": {"scorer": "sparsegpt", "pattern": "2:4"},
    "block": {"scorer": "sparsegpt", "sparsity": 0.5, "pattern": {"name": "block", "rows": 2, "cols": 4}},
    "magnitude": {"scorer": "magnitude", "sparsity": 0.5, "reconstruction": "cg"},
    "owl": {"scorer": "wanda", "sparsity": 0.6, "selection": "owl"},
}
CASES = [(kind, name) for kind in mixtures.KINDS for name in GROUPS] + [("qwen2-moe", "sparsegpt 2:4")]


def save(folder: Path, kind: str, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """Write a model in so many files that each block lies in several."""
    model = mixtures.build(kind, unreached=True).to(dtype)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder, max_shard_size="8KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for key, file in index.items() if ".layers.1." in key}) > 1
    return folder


def loaded_whole(folder: Path) -> Any:
    """Return a model in memory of its own: products with mapped files, which are not aligned, differ in last bits."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def same(a: Any, b: Any) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, weight in b.state_dict().items():
        assert torch.equal(a.state_dict()[key], weight), key


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_checkpoint_is_pruned_as_the_model_in_memory_is(tmp_path: Path, kind: str, name: str) -> None:
    source, group = save(tmp_path / "source", kind), {"targets": TARGETS, **GROUPS[name]}
    expected = loaded_whole(source)
    sparsify(expected, SparsityConfig(**group), mixtures.batches())
    manifest = sparsify_checkpoint(source, tmp_path / "out", group, mixtures.batches(), max_shard_size="20KB")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same(loaded, expected)
    assert set(loaded.hf_sparse_weights) == set(expected.hf_sparse_weights)
    assert len(loaded.hf_sparse_weights) == 2 * 6 + 6 * (kind in ("qwen2-moe", "llama4"))
    expected.save_pretrained(tmp_path / "memory")
    assert set(manifest.targets) == {tensor.name for tensor in inspect(tmp_path / "memory").tensors if tensor.targeted}
    dense: Any = AutoModelForCausalLM.from_pretrained(source)
    for block in range(2):  # the router decides as before
        before, after = (mixtures.router(mixtures.mixture(model, block)) for model in (dense, loaded))
        same(after, before)


@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_magnitude_prunes_experts_without_data(tmp_path: Path, kind: str) -> None:
    source = save(tmp_path / "source", kind)
    group: dict[str, Any] = {"targets": TARGETS, "sparsity": 0.5}
    expected = loaded_whole(source)
    sparsify(expected, SparsityConfig(**group))
    sparsify_checkpoint(source, tmp_path / "out", group)
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected)


def test_files_hold_the_experts_as_the_source_does(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "mixtral", torch.bfloat16)
    group = {"scorer": "sparsegpt", "sparsity": 0.5, "targets": ["*.experts.down_proj"]}
    manifest = sparsify_checkpoint(source, tmp_path / "out", group, mixtures.batches())
    names = [
        f"model.layers.{block}.block_sparse_moe.experts.{expert}.w2.weight" for block in (0, 1) for expert in range(5)
    ]
    assert list(manifest.targets) == names
    with safe_open(sorted(source.glob("*.safetensors"))[0], "pt") as file:
        assert set(file.keys()) <= set(manifest.tensors)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in loaded.state_dict().values()} == {torch.bfloat16}
    experts = loaded.model.layers[1].mlp.experts
    assert [float((weight == 0).float().mean()) for weight in experts.down_proj] == [0.5] * 5
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert torch.equal(experts.gate_up_proj, dense.model.layers[1].mlp.experts.gate_up_proj)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "qwen3-moe", tied=True)
    group = {"targets": TARGETS, **GROUPS["wanda"]}
    expected = loaded_whole(source)
    sparsify(expected, SparsityConfig(**group), mixtures.batches())
    sparsify_checkpoint(source, tmp_path / "out", group, mixtures.batches())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same(loaded, expected)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("weights", [9, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_run_goes_on_to_the_same_bits_and_names_the_same_experts(
    tmp_path: Path, weights: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = mixtures.build("mixtral", unreached=True)
    model.model.layers = torch.nn.ModuleList([model.model.layers[1], model.model.layers[0]])
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source, max_shard_size="8KB")
    group = {"targets": TARGETS, **GROUPS["sparsegpt 2:4"]}
    sparsify_killed(source, out, group, mixtures.batches, weights, spill=True)
    assert len(list((out / ".pruning" / "blocks").iterdir())) == (weights - 1) // 6
    messages = []
    for folder in (out, tmp_path / "whole"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sparsify_checkpoint(source, folder, group, mixtures.batches())
        messages.append([record.message for record in caplog.records if "no token" in record.message])
    assert messages[0] == messages[1] != []
    assert messages[0][0].startswith("1 of 10 experts (10.0%)")
    files = [
        {path.name: path.read_bytes() for path in sorted(each.iterdir()) if path.is_file()}
        for each in (out, tmp_path / "whole")
    ]
    assert files[0] == files[1]
