"""Layers whose weight is read without a call, so that nothing is known of their inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_sparse import SparsityConfig, SparsityError, sparsify
from tests.helpers import decoders, oneshot


def jamba() -> Any:
    """Return a model with a Mamba layer, which multiplies by the weight of `dt_proj` itself, and an attention."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in decoders.SIZES.items() if key != "head_dim"}
    sizes |= {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 4, "num_experts": 1, "num_experts_per_tok": 1}
    sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return transformers.JambaForCausalLM(transformers.JambaConfig(**sizes)).eval()


def test_weight_that_is_read_without_a_call_is_named_with_how_to_leave_it_out() -> None:
    model, batches = jamba(), [{"input_ids": torch.arange(5, 35).view(2, 15)}]
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    group: dict[str, Any] = {"scorer": "wanda", "sparsity": 0.5}
    with pytest.raises(SparsityError) as caught:
        sparsify(model, SparsityConfig(**group), batches)
    message = str(caught.value)
    assert message.startswith("'model.layers.0.mamba.dt_proj' took no part in the forward passes")
    assert "the model reads its weight without calling it" in message
    assert message.endswith("exclude: ['*.dt_proj']")
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    sparsify(model, SparsityConfig(**group, exclude=["*.dt_proj"]), batches)  # what the message says
    mamba = model.model.layers[0].mamba
    assert torch.equal(mamba.dt_proj.weight, before["model.layers.0.mamba.dt_proj.weight"])
    expected = oneshot._removed(mamba.in_proj.weight.shape[1], 0.5, None)
    assert (mamba.in_proj.weight == 0).sum(1).eq(expected).all()


def test_scorer_of_weights_needs_no_call_beside_one_of_inputs() -> None:
    model, batches = jamba(), [{"input_ids": torch.arange(5, 35).view(2, 15)}]
    groups: list[dict[str, Any]] = [
        {"scorer": "wanda", "sparsity": 0.5, "exclude": ["*.dt_proj"]},
        {"scorer": "magnitude", "sparsity": 0.5, "targets": ["*.dt_proj"]},
    ]
    dense = model.model.layers[0].mamba.dt_proj.weight.detach().clone()
    sparsify(model, SparsityConfig(groups=groups), batches)
    pruned = model.model.layers[0].mamba.dt_proj.weight
    threshold = dense.abs().flatten().sort().values[dense.numel() // 2]
    assert torch.equal(pruned, torch.where(dense.abs() >= threshold, dense, 0.0))
