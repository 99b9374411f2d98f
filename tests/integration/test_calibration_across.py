"""One-shot pruning with the calibration data divided over two processes equals one process with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_sparse import RecipeError, SparsityConfig, sparsify
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded import VOCABULARY, build

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"scorer": "wanda"},
    "sparsegpt": {"scorer": "sparsegpt"},
    "owl": {"scorer": "wanda", "selection": "owl"},
    "taylor": {"scorer": "taylor"},
    "head_importance": {"scorer": "head_importance", "pattern": "head"},
    "reconstruction": {"scorer": "magnitude", "reconstruction": "cg"},
}


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, VOCABULARY, (7, 2, 9), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": each, "labels": each} for each in ids]


# In float64, as the order of the sums is another one.
def pruned(method: str, share: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return dict(sparsify(build("llama").double(), SparsityConfig(sparsity=0.5, **METHODS[method]), share).state_dict())


def alone(folder: Path) -> None:
    """Write what one process makes of all batches."""
    torch.save({method: pruned(method, batches()) for method in METHODS}, folder / "alone.pt")


def across(folder: Path) -> None:
    """On each rank: the same of a share of the batches, one more on the first."""
    dist.init_process_group("gloo")
    expected = torch.load(folder / "alone.pt", weights_only=True)
    share = batches()[dist.get_rank() :: dist.get_world_size()]
    for method in METHODS:
        found = pruned(method, share)
        for name, tensor in expected[method].items():
            if "layers." in name and tensor.ndim == 2:
                assert torch.equal(found[name] == 0, tensor == 0), (method, name)
            # A fixed number of steps of conjugate gradients makes the last digits of the sums larger.
            close = 1e-4 if method == "reconstruction" else 1e-9
            torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=close)
        assert any((tensor == 0).float().mean() > 0.4 for tensor in found.values())
    with pytest.raises(RecipeError, match=r"weighs the last batches most.*momentum=1"):
        sparsify(build("llama"), SparsityConfig(sparsity=0.5, scorer={"name": "taylor", "momentum": 0.5}), share)


def test_shares_of_the_data_add_up(tmp_path: Path) -> None:
    alone(tmp_path)
    on_ranks(__name__, "across", tmp_path)
