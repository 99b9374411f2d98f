"""One, two and three processes that divide the scores select what one selects that has them all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_sparse import SparsityError
from hf_sparse.pruning.selection.topk import keep_highest
from hf_sparse.pruning.selection.topk_radix import keep_highest_across
from tests.helpers.ranks import on_ranks
from tests.pruning.selection.test_topk import random_case

CASES = 300


def shard(scores: torch.Tensor) -> torch.Tensor:
    """Return the rows of this rank, as fully_shard divides them: the last ranks may have fewer, or none."""
    parts = scores.chunk(dist.get_world_size())
    rank = dist.get_rank()
    return parts[rank] if rank < len(parts) else scores[:0]


def worker(folder: Path) -> None:
    """What each rank runs: every random case, against the selection by one process."""
    dist.init_process_group("gloo")
    for seed in range(CASES):
        scores, keep = random_case(seed)
        masks, cut = keep_highest_across([shard(tensor) for tensor in scores], keep)
        expected, same_cut = keep_highest(scores, keep)
        assert cut == same_cut, (seed, cut, same_cut)
        for mask, whole in zip(masks, expected, strict=True):
            assert torch.equal(mask, shard(whole)), seed
    # One rank's NaN is an error on all of them, so that none waits for another.
    with pytest.raises(SparsityError, match="NaN among the scores"):
        keep_highest_across([torch.full((4,), float("nan") if dist.get_rank() == 0 else 1.0)], 1)
    (folder / f"done{os.environ['RANK']}").write_text(str(CASES))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_random_cases_are_selected_as_by_one_process(tmp_path: Path, count: int) -> None:
    on_ranks(__name__, "worker", tmp_path, count)
    assert sorted(path.name for path in tmp_path.glob("done*")) == [f"done{rank}" for rank in range(count)]
