"""Two processes with tp_plan="auto": a packed checkpoint is decoded, then cut; it computes and is saved as by one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, sparsify, summarize
from hf_sparse.pruning.shards import whole
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded import build

IDS = torch.tensor([[1, 2, 3, 4]])
KINDS: dict[str, dict[str, Any]] = {
    "element": {"sparsity": 0.9},
    "2:4": {"pattern": "2:4"},
    "head+neuron": {"pattern": "head+neuron", "sparsity": 0.5},
}


def answers(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        generated = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return {"logits": model(IDS).logits.tolist(), "generated": generated.tolist()}


def make(folder: Path) -> None:
    """Write one packed checkpoint of each kind, and what one process computes with it."""
    for kind, options in KINDS.items():
        sparsify(build("llama"), SparsityConfig(**options)).save_pretrained(folder / kind)
        model = AutoModelForCausalLM.from_pretrained(folder / kind).eval()
        (folder / kind / "answers.json").write_text(json.dumps(answers(model)))


def worker(folder: Path) -> None:
    """On each rank: load in parts, compute, and save again."""
    dist.init_process_group("gloo")
    for kind in KINDS:
        model = AutoModelForCausalLM.from_pretrained(folder / kind, tp_plan="auto").eval()
        alone = AutoModelForCausalLM.from_pretrained(folder / kind)
        sparse = {weight.name for weight in summarize(alone).weights}
        for name, expected in alone.state_dict().items():
            found = model.state_dict()[name]
            assert torch.equal(whole(found), expected), (kind, name)
            if name in sparse and isinstance(found, DTensor):  # a part that does not hold on to the whole
                assert found.to_local().untyped_storage().nbytes() == found.to_local().nbytes, (kind, name)
        assert model.model.layers[0].mlp.down_proj.weight.to_local().shape == (32, 32)
        assert summarize(model) == summarize(alone)
        (folder / f"{kind}-{os.environ['RANK']}.json").write_text(json.dumps(answers(model)))
        model.save_pretrained(folder / f"{kind} again")


def test_packed_checkpoint_is_loaded_in_parts(tmp_path: Path) -> None:
    make(tmp_path)
    on_ranks(__name__, "worker", tmp_path)
    for kind in KINDS:
        expected = json.loads((tmp_path / kind / "answers.json").read_text())
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
            assert found["generated"] == expected["generated"], kind
            logits = torch.tensor(expected["logits"])
            torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-5, atol=1e-5)
        for name in ("model.safetensors", "config.json", "generation_config.json"):
            assert (tmp_path / f"{kind} again" / name).read_bytes() == (tmp_path / kind / name).read_bytes(), name
