"""The memory that scripts/tools/scaling.py computes is what two processes hold."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_sparse import Pruner, SparsityConfig
from scripts.tools import scaling
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded import SCORERS, batch, build, shard


def holds(folder: Path) -> None:
    """On each rank: one step by each strategy, and what is in memory after it."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for strategy in scaling.STRATEGIES:
        for scorer in SCORERS:
            model = build("llama")
            sizes = scaling.sizes_of(model)
            config = SparsityConfig(sparsity=0.5, scorer=SCORERS[scorer], schedule="constant")
            pruner = Pruner(model, config).attach()
            called = DistributedDataParallel(model) if strategy == "DDP" else shard(model)
            optimizer = torch.optim.AdamW(pruner.parameter_groups())
            pruner.step(0.0)
            called(**batch(0, rank, ranks)).loss.backward()
            optimizer.step()
            pruner.step(1.0)
            expected = scaling.memory(sizes, strategy, ranks, scorer == "movement")
            for part, found in scaling.measured(pruner, optimizer).items():
                assert abs(found - expected[part]) <= 0.01 * expected[part], (strategy, scorer, part, found, expected)


def test_memory_is_what_processes_hold(tmp_path: Path) -> None:
    on_ranks(__name__, "holds", tmp_path)


def test_sizes_of_the_models_of_the_tables() -> None:
    found = {name: scaling.sizes_of(model) for name, model in scaling.large_models().items()}
    assert round(found["T5-11B"].parameters / 1e9, 1) == 11.3
    decoder = found["7B decoder"]
    assert decoder.parameters == 6738415616
    assert decoder.targeted == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert decoder.block_targeted * 32 == decoder.targeted
    assert decoder.layer == 4096 * 11008
    assert "| 7B decoder | FSDP2 | movement |" in scaling.table(8)
