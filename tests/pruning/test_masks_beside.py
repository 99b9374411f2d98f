"""Masks beside weights, as for DeepSpeed ZeRO-3, on one process with the few calls of DeepSpeed that they need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_sparse import CheckpointError, Pruner, RecipeError, SparsityConfig
from hf_sparse.pruning.masked_weight import hidden, masks_on
from hf_sparse.pruning.masks_beside import MaskBeside
from tests.helpers.ranks import one_process

CONFIG: dict[str, Any] = {"targets": "*", "sparsity": 0.5, "schedule": "constant"}


@pytest.fixture(autouse=True)
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process, and DeepSpeed's calls for what `partition` makes."""

    def get(parameter: Any) -> Tensor:
        flat: Tensor = parameter._z3_optimizer.flats[parameter]
        return flat.detach()

    def put(parameter: Any, value: Tensor) -> None:
        get(parameter).copy_(value)

    calls = SimpleNamespace(safe_get_local_fp32_param=get, safe_set_local_fp32_param=put)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", calls)
    with one_process():
        yield


def partition(model: nn.Module) -> torch.optim.Optimizer:
    """Leave parameters as ZeRO-3 does between passes, of shape (0,); return the optimizer of the flat partitions."""
    flats = {parameter: nn.Parameter(parameter.detach().flatten().clone()) for parameter in model.parameters()}
    optimizer = torch.optim.SGD(flats.values(), lr=1.0)
    for number, (parameter, flat) in enumerate(flats.items()):
        found: Any = parameter
        found.ds_id, found.ds_process_group = number, dist.group.WORLD
        found.ds_tensor, found.ds_status = flat.detach().clone(), SimpleNamespace(name="NOT_AVAILABLE")
        found._z3_optimizer = SimpleNamespace(optimizer=optimizer, flats=flats)
        found.data = torch.empty(0)
    return optimizer


def pruned() -> tuple[nn.Sequential, Pruner, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2))
    pruner = Pruner(model, CONFIG).attach()
    return model, pruner, partition(model)


def flat_of(model: Any) -> nn.Parameter:
    weight: Any = hidden(model[0])
    flat: nn.Parameter = weight._z3_optimizer.flats[weight]
    return flat


def shares(model: Any) -> tuple[Tensor, Tensor]:
    """Return what the optimizer has of the weight, and what DeepSpeed computes with."""
    weight: Any = hidden(model[0])
    return flat_of(model).detach(), weight.ds_tensor


def test_zeros_are_in_the_partitions_and_values_come_back() -> None:
    model, pruner, optimizer = pruned()
    dense = shares(model)[0].clone()
    pruner.step(0.0)
    kept = dense.abs() >= dense.abs().sort().values[4]
    for share in shares(model):
        assert torch.equal(share, torch.where(kept, dense, 0.0))
    # A step sees the dense weight: entries move wherever they are, as under a mask. What was removed may come back.
    master, _ = shares(model)
    flat_of(model).grad = torch.where(kept, dense, dense.sign() * -9.0)
    optimizer.step()
    assert not master[~kept].any()
    pruner.step(0.1)
    assert torch.equal(shares(model)[0] != 0, ~kept)
    pruner.detach()
    assert torch.allclose(shares(model)[0], torch.where(kept, 0.0, dense + dense.sign() * 9.0))


def test_baked_zeros_stay_in_training() -> None:
    model, pruner, optimizer = pruned()
    pruner.step(1.0)
    pruner.bake()
    assert not masks_on(model[0])
    zeros = shares(model)[0] == 0
    flat_of(model).grad = torch.ones(8)
    optimizer.step()
    assert torch.equal(shares(model)[0] == 0, zeros)
    assert int(zeros.sum()) == 4


def test_state_dicts_have_the_shares() -> None:
    model, pruner, _ = pruned()
    pruner.step(1.0)
    state = model.state_dict()
    assert set(state) == {"0.weight", "0.weight_kept", "0.weight_hidden", "0.bias"}
    other, again, _ = pruned()
    again.move_beside()
    assert other.load_state_dict(state).missing_keys == []
    masks = [masks_on(each[0])["weight"] for each in (model, other)]
    assert torch.equal(masks[0].mask.full_tensor(), masks[1].mask.full_tensor())  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="not the share of this process"):
        other.load_state_dict({**state, "0.weight_kept": torch.ones(3, dtype=torch.bool)})


def test_masks_move_beside_before_the_model_is_partitioned() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    pruner = Pruner(model, CONFIG).attach()
    pruner.move_beside()
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert type(model[0]) is nn.Linear
    partition(model)
    pruner.step(0.0)
    pruner.finish()
    assert isinstance(masks_on(model[0])["weight"], MaskBeside)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"scorer": "movement"}, "scorer 'movement' does not work with DeepSpeed ZeRO-3"),
        ({"scorer": {"name": "set", "every": 1}}, "scorer 'set' does not work with DeepSpeed ZeRO-3"),
        ({"scorer": "taylor"}, "scorer 'taylor' does not work with DeepSpeed ZeRO-3"),
    ],
)
def test_what_reads_gradients_or_writes_weights_is_refused(options: dict[str, Any], found: str) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    pruner = Pruner(model, SparsityConfig(**{**CONFIG, **options})).attach()
    partition(model)
    with pytest.raises(RecipeError, match=found):
        pruner.step(0.0)


def test_a_frozen_weight_and_one_without_an_optimizer_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    pruner = Pruner(model, CONFIG).attach()
    with pytest.raises(RecipeError, match=r"'0.weight' is frozen .* no float32 partition"):
        pruner.move_beside()
    model, pruner, _ = pruned()
    weight: Any = hidden(model[0])
    del weight._z3_optimizer
    with pytest.raises(RecipeError, match="no optimizer of DeepSpeed has it"):
        pruner.step(0.0)
    with pytest.raises(RecipeError, match="before there was a mask on it"):
        Pruner(model, CONFIG)


@pytest.mark.parametrize("setting", ["swap_optimizer", "params_in_nvme_and_cpu", "zenflow"])
def test_partitions_that_are_elsewhere_are_refused(setting: str) -> None:
    model, pruner, _ = pruned()
    weight: Any = hidden(model[0])
    setattr(weight._z3_optimizer, setting, True)
    with pytest.raises(RecipeError, match=r"pruning does not work with (offloading to NVMe|zenflow) of DeepSpeed"):
        pruner.step(0.0)
