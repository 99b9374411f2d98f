"""DeepSpeed in a loop of one's own, on two processes: ZeRO-1 and 2 make masks and weights of DDP, ZeRO-3 is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_sparse import Pruner, RecipeError, SparsityConfig
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded import BATCH, GRADIENT_SCORERS, SCORERS, batch, build, run, trained

deepspeed: Any = pytest.importorskip("deepspeed")

METHODS = ("magnitude", "movement", "taylor", "rigl")


def zero(scorer: str, stage: int) -> tuple[Pruner, list[int]]:
    """Train as `trained` does, by an engine of DeepSpeed."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build("bert")
    method = {**SCORERS, **GRADIENT_SCORERS}[scorer]
    pruner = Pruner(model, SparsityConfig(sparsity=0.7, scorer=method, schedule={"name": "linear"})).attach()
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // ranks, "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0, "zero_optimization": {"stage": stage},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return pruner, run(pruner, lambda step: engine.backward(engine(**batch(step, rank, ranks)).loss), engine.step)


def worker(folder: Path) -> None:
    """On each rank: every method by DDP, and by both stages."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which is compiled at its first use
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for scorer in METHODS:
        pruner, masks = trained("bert", scorer, {}, "ddp")
        expected = pruner.bake().state_dict()
        for stage in (1, 2):
            found, same = zero(scorer, stage)
            assert same == masks, (scorer, stage)
            for name, tensor in found.bake().state_dict().items():
                assert torch.equal(tensor, expected[name]), (scorer, stage, name)
    with pytest.raises(RecipeError, match=r"ZeRO-3, which leaves it empty, of shape \(0,\)"):
        zero("magnitude", 3)
    (folder / f"done-{os.environ['RANK']}").touch()


@pytest.mark.slow
def test_zero_1_and_2_are_ddp(tmp_path: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    on_ranks(__name__, "worker", tmp_path)
