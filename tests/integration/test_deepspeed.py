"""DeepSpeed in a loop of one's own, on two processes: ZeRO-1, 2 and 3 make masks and weights of DDP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_sparse import Pruner, RecipeError, SparsityConfig, SparsityError
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded import BATCH, GRADIENT_SCORERS, MORE_PATTERNS, PATTERNS, SCORERS, batch, build, run, trained

deepspeed: Any = pytest.importorskip("deepspeed")

METHODS = ("magnitude", "movement", "taylor", "rigl")
WEIGHT_PATTERNS = {**PATTERNS, "global": MORE_PATTERNS["global"], "row": MORE_PATTERNS["row"]}
GATHERED, SMALL_ONES_STAY = 0, 10**5
"""Thresholds below which ZeRO-3 keeps parameters gathered (stage3_param_persistence_threshold)."""


def begin() -> None:
    """Join the group of processes, without the extension of DeepSpeed that is compiled at its first use."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, threshold: int = GATHERED) -> Any:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": threshold}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(), "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0, "zero_optimization": zero,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def pruner_of(scorer: str, options: dict[str, Any]) -> Pruner:
    method = {**SCORERS, **GRADIENT_SCORERS}[scorer]
    return Pruner(
        build("bert"),
        SparsityConfig(**{"sparsity": 0.7, "scorer": method, "schedule": {"name": "linear"}, **options}),
    ).attach()


def zero(scorer: str, stage: int, options: dict[str, Any], threshold: int = GATHERED) -> tuple[Pruner, Any, list[int]]:
    """Train as `trained` does, by an engine of DeepSpeed."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pruner = pruner_of(scorer, options)
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
    engine = engine_of(pruner.model, optimizer, stage, threshold)
    masks = run(pruner, lambda step: engine.backward(engine(**batch(step, rank, ranks)).loss), engine.step)
    return pruner, engine, masks


def worker(folder: Path) -> None:
    """On each rank: every method by DDP, and by ZeRO-1 and 2."""
    begin()
    for scorer in METHODS:
        pruner, masks = trained("bert", scorer, {}, "ddp")
        expected = pruner.bake().state_dict()
        for stage in (1, 2):
            found, _, same = zero(scorer, stage, {})
            assert same == masks, (scorer, stage)
            for name, tensor in found.bake().state_dict().items():
                assert torch.equal(tensor, expected[name]), (scorer, stage, name)
    (folder / f"done-{os.environ['RANK']}").touch()


@pytest.mark.slow
def test_zero_1_and_2_are_ddp(tmp_path: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    on_ranks(__name__, "worker", tmp_path)


def check_same(engine: Any, expected: dict[str, Tensor], what: object) -> None:
    """Compare the weights that DeepSpeed would save with those of DDP; zeros are zeros."""
    found = engine._zero3_consolidated_16bit_state_dict()
    if dist.get_rank() != 0:
        return
    assert found.keys() == expected.keys(), what
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=f"{what} {name}")
        # A gradient of rounding errors moves a bias that DDP leaves at zero: the masked weights are compared.
        assert torch.equal(tensor == 0, expected[name] == 0) or "layer." not in name or tensor.ndim < 2, (what, name)


def partitions(folder: Path) -> None:
    """On each rank: every pattern by DDP, and by ZeRO-3 with all parameters partitioned, and with none."""
    begin()
    for pattern, options in WEIGHT_PATTERNS.items():
        pruner, masks = trained("bert", "magnitude", options, "ddp")
        expected = pruner.bake().state_dict()
        for threshold in (GATHERED, SMALL_ONES_STAY):
            found, engine, same = zero("magnitude", 3, options, threshold)
            assert same == masks, (pattern, threshold)
            found.bake()
            check_same(engine, expected, (pattern, threshold))
    keeps_zeros_after(engine)
    restores_dense_weights()
    resumes(folder)
    divides_odd_sizes()
    refuses()
    (folder / f"done-{os.environ['RANK']}").touch()


def keeps_zeros_after(engine: Any) -> None:
    """Training that goes on after `bake` keeps the zeros."""
    before = engine._zero3_consolidated_16bit_state_dict()
    engine.backward(engine(**batch(9, dist.get_rank(), dist.get_world_size())).loss)
    engine.step()
    after = engine._zero3_consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        for name, tensor in before.items():
            assert torch.equal(tensor == 0, after[name] == 0) or "layer." not in name or tensor.ndim < 2, name
        assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def restores_dense_weights() -> None:
    """`detach` gives back what was removed."""
    dense = build("bert").state_dict()
    pruner = pruner_of("magnitude", {})
    engine = engine_of(pruner.model, torch.optim.SGD(pruner.parameter_groups(), lr=0.1), 3)
    pruner.step(1.0)
    assert round(pruner.logs()["sparsity"], 2) == 0.7
    with pytest.raises(SparsityError, match="partitioned by DeepSpeed ZeRO-3, so its zeros cannot be counted"):
        pruner.summary()
    pruner.detach()
    check_same(engine, dense, "detach")


def resumes(folder: Path) -> None:
    """A run from a checkpoint of DeepSpeed ends with the masks and weights of the uninterrupted one."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ends = []
    for resumed in (False, True):
        pruner = pruner_of("magnitude", {"schedule": {"name": "linear", "every": 2}})
        engine = engine_of(pruner.model, torch.optim.AdamW(pruner.parameter_groups(), lr=0.01), 3)
        if resumed:
            pruner.move_beside()
            engine.load_checkpoint(str(folder / "checkpoint"))
        else:
            pruner.step(0.25, step=2)  # whose masks stay for another step
        for step in range(3 if resumed else 0, 5):
            engine.backward(engine(**batch(step, rank, ranks)).loss)
            engine.step()
            if step == 2:
                engine.save_checkpoint(str(folder / "checkpoint"))
            pruner.step((step + 3) / 8, step=step + 3)
        pruner.bake()
        ends.append(engine._zero3_consolidated_16bit_state_dict())
    if rank == 0:
        for name, tensor in ends[0].items():
            assert torch.equal(tensor, ends[1][name]), name


def divides_odd_sizes() -> None:
    """Rows that the processes do not share evenly, and weights of fewer rows than processes."""
    ends, masks = [], []
    config = {"targets": "*", "sparsity": 0.5, "schedule": "constant"}
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    for how in ("ddp", "zero"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
        pruner = Pruner(model, config).attach()
        optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
        called: Any = DistributedDataParallel(model) if how == "ddp" else engine_of(model, optimizer, 3)
        pruner.step(0.0)
        for step in range(3):
            loss = called(inputs + step).square().mean()
            if how == "ddp":
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                called.backward(loss)
                called.step()
            pruner.step((step + 1) / 3)
            masks.append([int(unit.kept().sum()) for unit in pruner.units])
        pruner.bake()
        ends.append(model.state_dict() if how == "ddp" else called)
    assert masks[:3] == masks[3:]
    check_same(ends[1], ends[0], "odd")


def refuses() -> None:
    """What does not work is refused before a step."""
    pruner = pruner_of("movement", {})
    engine_of(pruner.model, torch.optim.SGD(pruner.parameter_groups(), lr=0.1), 3)
    with pytest.raises(RecipeError, match="scorer 'movement' does not work with DeepSpeed ZeRO-3: it learns"):
        pruner.step(0.0)
    model = build("bert")
    engine_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    with pytest.raises(RecipeError, match=r"partitioned by DeepSpeed ZeRO-3 before there was a mask on it"):
        Pruner(model, SparsityConfig(sparsity=0.5))


@pytest.mark.slow
def test_zero_3_is_ddp_for_scorers_of_weights(tmp_path: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    on_ranks(__name__, "partitions", tmp_path)
