"""What every scorer, pattern, selection and schedule promises, over all that are registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import PatternError, Pruner, SparsityConfig, summarize
from hf_sparse.config import PATTERNS, SCHEDULES, SCORERS, SELECTIONS

SHAPE = (64, 96)
OPTIONS: dict[str, dict[str, Any]] = {"block": {"rows": 8, "cols": 16}}


def spec(name: str) -> dict[str, Any]:
    return {"name": name, **OPTIONS.get(name, {})}


@pytest.mark.parametrize("pattern", list(PATTERNS))
@pytest.mark.parametrize("scorer", list(SCORERS))
def test_every_scorer_works_with_every_pattern(scorer: str, pattern: str) -> None:
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]), nn.ReLU(), nn.Linear(SHAPE[0], 64))
    fixed = PATTERNS.build(spec(pattern)).fixed_sparsity
    asked = fixed if fixed is not None else 0.75
    config = SparsityConfig(
        targets="*", scorer=scorer, pattern=spec(pattern), sparsity=asked, schedule={"name": "linear", "begin": 0.0}
    )
    pruner = Pruner(model, config).attach()
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
    for step in range(4):
        pruner.step(step / 4, step=step)
        loss = model(torch.randn(5, SHAPE[1])).square().mean() + pruner.penalty()
        loss.backward()
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
    pruner.step(1.0)
    for unit in pruner.units:
        groups = unit.pattern.pool(unit.masked.mask.float())
        assert set(groups.view(-1).tolist()) <= {0.0, 1.0}  # a group is kept or removed as a whole
    pruner.finish()
    pruner.bake()
    assert summarize(model).sparsity == pytest.approx(asked, abs=0.02)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_every_pattern_pools_and_expands_consistently(pattern: str) -> None:
    made = PATTERNS.build(spec(pattern))
    made.check(SHAPE, "weight")
    kept = torch.rand(made.groups_shape(SHAPE)) < 0.5
    mask = made.expand(kept, SHAPE)
    assert mask.shape == SHAPE
    assert mask.dtype == torch.bool
    assert torch.equal(made.pool(mask.float()) == 1.0, kept)
    scores = torch.rand(SHAPE)
    size = scores.numel() / kept.numel()
    torch.testing.assert_close(made.pool(scores, "sum"), made.pool(scores, "mean") * size)


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "element"])
def test_every_pattern_but_element_refuses_what_is_no_matrix(pattern: str) -> None:
    with pytest.raises(PatternError, match=r"needs a matrix, but 'conv\.weight' has shape \(2, 3, 4\)"):
        PATTERNS.build(spec(pattern)).check((2, 3, 4), "conv.weight")


@pytest.mark.parametrize("selection", list(SELECTIONS))
def test_every_selection_keeps_the_count_and_the_best(selection: str) -> None:
    scores = [torch.rand(40, 10), torch.rand(30, 20)]
    kept = SELECTIONS.build(selection).select(scores, 0.9)
    assert [mask.shape for mask in kept] == [tensor.shape for tensor in scores]
    assert sum(int(mask.sum()) for mask in kept) == 100
    for mask, tensor in zip(kept, scores, strict=True):
        assert float(tensor[mask].min()) >= float(tensor[~mask].max())
    again = SELECTIONS.build(selection).select(scores, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_schedule_starts_low_never_falls_and_ends_where_asked(schedule: str) -> None:
    made = SCHEDULES.build(schedule)
    values = [made(step / 200, 0.9) for step in range(201)]
    assert values == sorted(values)
    assert values[0] == (0.9 if schedule == "constant" else 0.0)
    assert values[-1] == 0.9
    assert all(value == 0.9 for step, value in enumerate(values) if made.reached(step / 200))
