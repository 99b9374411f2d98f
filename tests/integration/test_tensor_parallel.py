"""Two processes under torchrun with tp_plan="auto": a packed checkpoint is refused, and the advice given works."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sparse import BackendError, SparsityConfig, sparsify
from tests.helpers.ranks import on_ranks

IDS = torch.tensor([[1, 2, 3, 4]])


def worker(folder: Path) -> None:
    """What each rank runs: load both checkpoints into shards, and write down what came of it."""
    found: dict[str, object] = {}
    try:
        AutoModelForCausalLM.from_pretrained(folder / "packed", tp_plan="auto")
    except BackendError as error:
        found["packed"] = str(error)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", tp_plan="auto")
    found["shard"] = list(model.model.layers[0].self_attn.q_proj.weight.to_local().shape)
    found["logits"] = model(IDS).logits.tolist()
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_tensor_parallel_load_is_refused_and_a_dense_file_is_the_way(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    sparsify(model, SparsityConfig(sparsity=0.9)).save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense", format="dense")
    on_ranks(__name__, "worker", tmp_path)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert "cannot be loaded into shards (tp_size=2)" in found["packed"]
        assert found["shard"] == [16, 32]
        torch.testing.assert_close(torch.tensor(found["logits"]), model(IDS).logits)
