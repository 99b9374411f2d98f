"""Layers that store their weight as (in, out) are pruned as if they stored it the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_sparse import PatternError, Pruner, SparsityConfig, sparsify, summarize
from tests.helpers import oneshot

PATTERNS: list[Any] = ["element", "2:4", "row", "column", {"name": "block", "rows": 4, "cols": 8}]


def pair() -> tuple[Any, Any]:
    """Return a `Conv1D` and a linear layer that compute the same."""
    torch.manual_seed(0)
    conv, linear = Conv1D(12, 16), nn.Linear(16, 12)
    linear.bias.data.zero_()
    conv.weight.data.normal_()
    linear.weight.data.copy_(conv.weight.data.T)
    return nn.Sequential(conv), nn.Sequential(linear)


@pytest.mark.parametrize("scorer", ["magnitude", "movement", "taylor", "rigl"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_conv1d_is_pruned_in_training_as_linear_is(pattern: Any, scorer: str) -> None:
    masks = []
    for model in pair():
        group: dict[str, Any] = {} if pattern == "2:4" else {"sparsity": 0.5}
        pruner = Pruner(model, SparsityConfig(targets="*", pattern=pattern, scorer=scorer, **group)).attach()
        optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
        for step in range(3):
            x = torch.randn(5, 16, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            pruner.observe()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step((step + 1) / 3)
        pruner.finish()
        baked: Any = pruner.bake()
        layer = baked[0]
        masks.append(layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach())
    assert torch.equal(masks[0] != 0, masks[1] != 0)
    torch.testing.assert_close(*masks)


def test_inputs_of_conv1d_are_what_a_pattern_has_to_fit() -> None:
    with pytest.raises(PatternError, match="needs the input dimension to be a multiple of 8"):
        sparsify(nn.Sequential(Conv1D(16, 12)), SparsityConfig(targets="*", pattern="4:8"))


def test_gpt2_is_pruned_saved_and_loaded(tmp_path: Path) -> None:
    model: Any = oneshot.gpt2()
    sparsify(model, SparsityConfig(scorer="sparsegpt", pattern="2:4"), oneshot.token_batches())
    assert summarize(model).sparsity == 0.5
    assert summarize(model).block_share == 1.0
    groups = model.transformer.h[0].mlp.c_proj.weight.T.reshape(-1, 4)
    assert (groups != 0).sum(1).eq(2).all()
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    tokens = oneshot.token_batches(1)[0]["input_ids"]
    loaded.train()  # the zeros stay in training
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1)
    loaded(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert (loaded.transformer.h[0].mlp.c_proj.weight.T.reshape(-1, 4) != 0).sum(1).le(2).all()
