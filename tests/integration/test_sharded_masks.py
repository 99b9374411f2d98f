"""Masks of weights that fully_shard (FSDP2) has divided are sharded beside them, and those of DDP at every step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_sparse.pruning.shards import local
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded import GRADIENT_SCORERS, MORE_PATTERNS, PATTERNS, SCORERS, STEPS, trained


def compare(folder: Path, families: tuple[str, ...] = ("bert",)) -> None:
    """On each rank: every scorer with every pattern, by DDP and sharded."""
    dist.init_process_group("gloo")
    found: dict[str, list[int]] = {}
    for family in families:
        patterns = {**PATTERNS, **MORE_PATTERNS} if len(families) > 1 else PATTERNS
        for name, options in patterns.items():
            for scorer in SCORERS:
                pruner, masks = trained(family, scorer, options, "fsdp")
                for member in (member for unit in pruner.units for member in unit.members):
                    mask, dense = member.masked.mask, member.dense
                    assert isinstance(mask, DTensor)
                    assert isinstance(dense, DTensor)
                    assert mask.placements == dense.placements
                    assert mask.to_local().shape == dense.to_local().shape
                sparsity = pruner.logs()["sparsity"]
                other, expected = trained(family, scorer, options, "ddp")
                assert masks == expected, (family, name, scorer)
                assert sparsity == other.logs()["sparsity"] > 0.25, (family, name, scorer)
                assert len(set(masks)) >= STEPS, (family, name, scorer)  # 2:4 passes through 3:4
                found[f"{family} {name} {scorer}"] = masks
    (folder / f"{dist.get_world_size()}-{os.environ['RANK']}.json").write_text(json.dumps(found))


def compare_all(folder: Path) -> None:
    """On each rank, for three families."""
    compare(folder, ("bert", "t5", "llama"))


def test_masks_of_ddp_at_every_step(tmp_path: Path) -> None:
    on_ranks(__name__, "compare", tmp_path)


def compare_gradients(folder: Path, families: tuple[str, ...] = ("bert",)) -> None:
    """On each rank: scorers of gradients and dynamic ones by DDP, sharded, and by one process with all batches."""
    dist.init_process_group("gloo")
    chosen = {"element": PATTERNS["element"], "head+neuron": PATTERNS["head+neuron"]}
    if len(families) > 1:
        chosen = PATTERNS
    for family in families:
        for name, options in chosen.items():
            for scorer in GRADIENT_SCORERS:
                pruner, masks = trained(family, scorer, options, "fsdp")
                for member in (member for unit in pruner.units for member in unit.members):
                    for buffer in member.masked.buffers():
                        assert isinstance(buffer, DTensor)
                        assert local(buffer).shape == local(member.dense).shape
                assert masks == trained(family, scorer, options, "ddp")[1], (family, name, scorer)
                assert masks == trained(family, scorer, options, "alone")[1], (family, name, scorer)
                assert len(set(masks)) >= STEPS, (family, name, scorer)
        for scorer in ("magnitude", "movement", "taylor", "rigl"):  # masks on a model that is sharded already
            for name, options in chosen.items():
                masks = trained(family, scorer, options, "fsdp first")[1]
                assert masks == trained(family, scorer, options, "ddp")[1], (family, name, scorer)
    (folder / f"gradients-{os.environ['RANK']}").touch()


def compare_all_gradients(folder: Path) -> None:
    """On each rank, for three families."""
    compare_gradients(folder, ("bert", "t5", "llama"))


def test_masks_by_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    on_ranks(__name__, "compare_gradients", tmp_path)


@pytest.mark.slow
def test_masks_by_gradients_for_every_family(tmp_path: Path) -> None:
    on_ranks(__name__, "compare_all_gradients", tmp_path)


@pytest.mark.slow
def test_masks_by_gradients_on_four_ranks(tmp_path: Path) -> None:
    on_ranks(__name__, "compare_gradients", tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_masks_of_ddp_for_every_family(ranks: int, tmp_path: Path) -> None:
    on_ranks(__name__, "compare_all", tmp_path, ranks)


@pytest.mark.slow
def test_masks_of_ddp_on_four_ranks(tmp_path: Path) -> None:
    on_ranks(__name__, "compare", tmp_path, 4)
