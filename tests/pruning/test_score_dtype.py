"""Scores in bfloat16: half the memory, the same exact counts, and training that resumes to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

from hf_sparse import Pruner, RecipeError, SparsityConfig, summarize
from hf_sparse.pruning.scorers import SoftMovement
from tests.helpers.layers import two_layers
from tests.helpers.training import RAMP, sparse_trainer

PATTERNS: dict[str, Any] = {
    "element": "element",
    "block": {"name": "block", "rows": 4, "cols": 4},
    "row": "row",
    "2:4": "2:4",
}


def scorer(name: str = "movement", **options: Any) -> dict[str, Any]:
    return {"name": name, "dtype": "bfloat16", **options}


def trained(dtype: str, pattern: Any = "element", name: str = "movement") -> tuple[Pruner, torch.optim.Optimizer]:
    options: dict[str, Any] = {} if pattern == "2:4" else {"sparsity": 0.5}
    config = SparsityConfig(targets="*", scorer={"name": name, "dtype": dtype}, pattern=pattern, **options)
    pruner = Pruner(two_layers(), config).attach()
    optimizer = torch.optim.AdamW(pruner.parameter_groups(), lr=1e-3)
    for step in range(4):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        ((pruner.model(x) - 1.0).square().mean() + pruner.penalty()).backward()
        optimizer.step()
        pruner.step((step + 1) / 4)
    return pruner, optimizer


@pytest.mark.parametrize("name", ["movement", "soft_movement"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exactly_half_is_kept(pattern: str, name: str) -> None:
    if pattern == "2:4" and name == "soft_movement":
        pytest.skip("2:4 has a selection of its own, soft_movement another")
    pruner, _ = trained("bfloat16", PATTERNS[pattern], name)
    assert all(scores.dtype == torch.bfloat16 for scores in pruner.groups[0].scores)
    assert any(bool(scores.any()) for scores in pruner.groups[0].scores)
    kept = sum(int(unit.kept().sum()) for unit in pruner.units)
    assert kept == sum(unit.kept().numel() for unit in pruner.units) // 2


def test_scores_that_bfloat16_cannot_tell_apart_are_kept_by_their_index() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    pruner = Pruner(model, SparsityConfig(targets="*", sparsity=0.5, scorer=scorer())).attach()
    with torch.no_grad():
        pruner.groups[0].scores[0].copy_(torch.tensor([[1.0, 0.5, 1.001, 1.002]]))  # the next above 1 is 1.0078
    pruner.step(1.0)
    assert pruner.units[0].masked.mask.tolist() == [[True, False, True, False]]


def test_scores_their_gradients_and_what_the_optimizer_keeps_of_them_take_half_the_memory() -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        pruner, optimizer = trained(dtype)
        scores = pruner.groups[0].scores
        held = [tensor for one in scores for tensor in (one, one.grad, *optimizer.state[one].values())]
        sizes[dtype] = sum(t.numel() * t.element_size() for t in held if t is not None and t.numel() > 1)
    groups = 2 * 8 * 16
    assert sizes == {"float32": 16 * groups, "bfloat16": 8 * groups}


def test_penalty_is_the_mean_however_many_scores_there_are() -> None:
    soft = SoftMovement(penalty_strength=1.0, dtype="bfloat16")
    soft.shared_state(1)
    soft.adapt(None, 1.0)
    many = torch.zeros(300, 1000, dtype=torch.bfloat16, requires_grad=True)
    penalty = soft.penalty([many])
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(0.5, rel=1e-6)
    assert many.grad is not None
    assert float(many.grad[0, 0]) == pytest.approx(0.25 / many.numel(), rel=1 / 128)


@pytest.mark.parametrize("name", ["movement", "soft_movement"])
def test_resumed_run_is_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    config = SparsityConfig(sparsity=0.9, scorer=scorer(name), schedule={**RAMP, "every": 3})
    whole = sparse_trainer(tmp_path / "whole", config, save_strategy="steps", save_steps=10)
    whole.train()
    assert summarize(whole.model).sparsity == pytest.approx(0.9, abs=1e-3)
    checkpoint = tmp_path / "whole" / "checkpoint-10"
    with safetensors.safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if key.endswith("_scores")]  # noqa: SIM118  it is no mapping
        assert {file.get_slice(key).get_dtype() for key in keys} == {"BF16"}
    again = sparse_trainer(tmp_path / "again", config, save_strategy="steps", save_steps=10)
    again.train(resume_from_checkpoint=str(checkpoint))
    for key, expected in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], expected), key


def test_other_types_and_scorers_without_scores_of_their_own_are_refused() -> None:
    with pytest.raises(
        RecipeError, match="scorer 'movement': `dtype` must be one of 'float32', 'bfloat16', got 'float16'"
    ):
        SparsityConfig(sparsity=0.5, scorer={"name": "movement", "dtype": "float16"})
    with pytest.raises(RecipeError, match="scorer 'magnitude' has no key 'dtype'"):
        SparsityConfig(sparsity=0.5, scorer=scorer("magnitude"))
