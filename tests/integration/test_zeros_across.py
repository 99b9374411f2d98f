"""Sparse models keep their zeros when they are trained further by several processes: DDP, fully_shard, ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_sparse import Pruner, SparsityConfig, sparsify
from tests.helpers.ranks import on_ranks
from tests.helpers.training import Rows, bert

STEPS, BATCH = 4, 8
HALF = SparsityConfig(sparsity=0.8)


class Filling(torch.optim.SGD):
    """Move every entry, whatever its gradient is."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= 0.01


def trained(wrap: str, kind: Any, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Train a sparse model further and return its whole state dict."""
    model = sparsify(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), HALF)
    called: Any = model
    if wrap == "fully_shard":
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    elif ranks > 1:
        called = DistributedDataParallel(model)
    if wrap == "zero" and ranks > 1:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), kind, lr=0.1, weight_decay=0.1)
    else:
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    rows = Rows(STEPS * BATCH)
    for step in range(STEPS):
        batch = [rows[step * BATCH + index] for index in range(rank, BATCH, ranks)]
        called(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def compare(folder: Path) -> None:
    """On each rank: every wrapper and optimizer gives what one process gives, zeros included."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    zeros = {name: t == 0 for name, t in sparsify(bert(), HALF).state_dict().items() if ".dense.weight" in name}
    for kind in (torch.optim.SGD, Filling):
        alone = trained("none", kind)
        for wrap in ("ddp", "zero", "fully_shard"):
            state = trained(wrap, kind, rank, ranks)
            for name, removed in zeros.items():
                if "pooler" not in name:
                    assert torch.equal(state[name] == 0, removed), (wrap, kind, name)
                torch.testing.assert_close(state[name], alone[name], rtol=1e-4, atol=1e-5)
    baked_under_fully_shard()


def baked_under_fully_shard() -> None:
    """Where masks stay on sharded weights, an optimizer that moves every entry leaves no trace in the state dict."""
    model = bert()
    pruner = Pruner(model, SparsityConfig(sparsity=0.8, schedule="constant")).attach()
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    pruner.step(1.0)
    pruner.bake()
    optimizer = Filling(model.parameters(), lr=0.1)
    key = "bert.encoder.layer.0.output.dense.weight"
    for _ in range(2):
        rows = Rows(BATCH)
        batch = [rows[index] for index in range(BATCH)]
        model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
        optimizer.step()
        weight: Any = model.state_dict()[key]
        assert float((weight.full_tensor() == 0).float().mean()) == pytest.approx(0.8, abs=0.01)


def test_processes_keep_the_zeros_that_one_process_keeps(tmp_path: Path) -> None:
    on_ranks("tests.integration.test_zeros_across", "compare", tmp_path)
