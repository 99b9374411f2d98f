"""Two processes under fully_shard (FSDP2), in a loop of one's own, make the masks and weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_sparse import CheckpointError, Pruner, SparsityConfig, SparsityError, summarize
from hf_sparse.pruning.masked_weight import hidden
from hf_sparse.pruning.selection.topk import keep_highest
from tests.helpers.ranks import on_ranks
from tests.helpers.training import Rows, bert

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": "magnitude"},
    "movement": {"scorer": {"name": "movement", "learning_rate": 1.0}},
    "global": {"scorer": {"name": "movement", "learning_rate": 1.0}, "selection": "global"},
    "soft": {"scorer": {"name": "soft_movement", "learning_rate": 1.0}},
    "neurons": {"scorer": {"name": "movement", "learning_rate": 1.0}, "pattern": "neuron"},
}
RAMP = {"name": "linear", "end": 0.5}
STEPS, BATCH = 8, 8


def trained(method: dict[str, Any], rank: int = 0, ranks: int = 1) -> tuple[Pruner, dict[str, torch.Tensor]]:
    """Train, sharded if there are several ranks, and return the pruner and the whole state dict."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pruner = Pruner(model, SparsityConfig(**{"sparsity": 0.8, "schedule": RAMP, **method})).attach()
    if ranks > 1:
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
    pruner.step(0.0)
    rows = Rows(STEPS * BATCH)
    for step in range(STEPS):
        batch = [rows[step * BATCH + index] for index in range(rank, BATCH, ranks)]
        model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.add(
            pruner.penalty()
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / STEPS)
    pruner.finish()
    assert pruner.logs()["sparsity"] > 0.75
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    return pruner, {name: tensor.clone() for name, tensor in state.items()}


def torchs_own_functions(model: Any) -> None:
    """`torch.distributed.checkpoint` gives the whole state, takes it back, and is refused where it would take half."""
    whole = StateDictOptions(full_state_dict=True)
    state: dict[str, Any] = get_model_state_dict(model, options=whole)
    assert {key.rpartition("weight")[2] for key in state if "output.dense.weight" in key} == {
        "", "_kept", "_hidden", "_scores",
    }  # fmt: skip
    plain = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    set_model_state_dict(model, dict(state), options=whole)
    again: dict[str, Any] = get_model_state_dict(model, options=whole)
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())
    if dist.get_rank() == 1:
        layer = model.bert.encoder.layer[0].output.dense
        lost = {"parametrizations.weight.original": hidden(layer)}  # what process 1 is left with after a broadcast
        with pytest.raises(CheckpointError, match=r"this process was given no 'weight'.*broadcast_from_rank0"):
            layer.load_state_dict(lost)


def baked(pruner: Pruner) -> None:
    """After `bake` the state dict is that of a plain model, which computes the same."""
    ids = Rows(4).ids
    model = pruner.model.eval()
    before = model(input_ids=ids).logits
    pruner.bake()
    model.zero_grad()
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    summary = summarize(model)
    alone = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval()
    alone.load_state_dict(state)
    assert summarize(alone, [weight.name for weight in summary.weights]) == summary
    assert summary.sparsity > 0.75
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alone(input_ids=ids).logits, before, rtol=1e-6, atol=1e-7)


def worker(folder: Path) -> None:
    """What each rank runs: all methods sharded, and what is refused."""
    dist.init_process_group("gloo")
    for name, method in METHODS.items():
        pruner, state = trained(method, dist.get_rank(), dist.get_world_size())
        torch.save(state, folder / f"{name}{dist.get_rank()}.pt")
    columns = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(1)])
    with pytest.raises(SparsityError, match="only rows divided over one dimension"):
        keep_highest([columns], 3)
    torchs_own_functions(pruner.model)
    baked(pruner)


@pytest.mark.slow
def test_sharded_training_is_training_by_one_process(tmp_path: Path) -> None:
    on_ranks(__name__, "worker", tmp_path)
    for name, method in METHODS.items():
        _, expected = trained(method)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                if key.endswith("_kept"):
                    assert torch.equal(found[key], tensor), f"{name}: {key}"
                    assert not tensor.all(), f"{name}: {key}"
                else:
                    torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
