"""The memory that scripts/tools/scaling.py computes is what two processes hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from hf_sparse import Pruner, SparsityConfig
from hf_sparse.pruning.shards import local
from scripts.tools import scaling
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded import SCORERS, batch, build, shard


def holds(folder: Path) -> None:
    """On each rank: one step by each strategy, and what is in memory after it."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for strategy in ("DDP", "FSDP2"):
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


def holds_by_deepspeed(folder: Path) -> None:
    """On each rank: a step by each stage of ZeRO, and what is in memory after it; weights and scores together."""
    from tests.integration.test_deepspeed import begin, engine_of  # which needs DeepSpeed

    begin()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for stage, scorer in ((1, "magnitude"), (1, "movement"), (2, "movement"), (3, "magnitude")):
        model = build("llama")
        sizes = scaling.sizes_of(model)
        config = SparsityConfig(sparsity=0.5, scorer=SCORERS[scorer], schedule="constant")
        pruner = Pruner(model, config).attach()
        engine = engine_of(model, torch.optim.AdamW(pruner.parameter_groups()), stage)
        pruner.step(0.0)
        engine.backward(engine(**batch(0, rank, ranks)).loss)
        engine.step()
        pruner.step(1.0)
        learned = scorer == "movement"
        parts = scaling.memory(sizes, f"ZeRO-{stage}", ranks, learned, sparsity=0.5)
        trained = sizes.parameters + learned * sizes.targeted
        expected = {
            "weights and scores": parts["weights"] + learned * scaling.FLOAT * sizes.targeted,
            "optimizer": parts["optimizer"] * trained / sizes.parameters,
            "masks": parts["masks"],
        }
        for part, found in scaling.measured_with_deepspeed(pruner, engine).items():
            assert abs(found - expected[part]) <= 0.01 * expected[part], (stage, scorer, part, found, expected)


@pytest.mark.slow
def test_memory_is_what_processes_hold_with_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    on_ranks(__name__, "holds_by_deepspeed", tmp_path)


def loads_in_parts(folder: Path) -> None:
    """On each rank: the weights of a model under tensor parallelism."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto")
    found = sum(local(parameter).numel() for parameter in model.parameters()) * scaling.FLOAT
    expected = scaling.tensor_parallel(scaling.sizes_of(build("llama")), dist.get_world_size())
    assert abs(found - expected) <= 0.01 * expected, (found, expected)


@pytest.mark.slow
def test_tensor_parallelism_divides_blocks_embeddings_and_head(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    on_ranks(__name__, "loads_in_parts", tmp_path)


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
    assert "| 7B decoder | ZeRO-3 | magnitude |" in scaling.table(8)


def test_zero_divides_more_with_each_stage() -> None:
    sizes = scaling.Sizes(parameters=1000, targeted=800, block=100, block_targeted=80, layer=40)
    totals = [sum(scaling.memory(sizes, f"ZeRO-{stage}", 8, learned=False).values()) for stage in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    parts = scaling.memory(sizes, "ZeRO-3", 8, learned=False, sparsity=0.5)
    assert (parts["weights"], parts["masks"]) == (500, 100 + 200)
    assert scaling.memory(sizes, "ZeRO-1", 8, learned=True)["scores"] == 800 * (4 + 4 + 12 / 8)
