"""What every scorer, pattern, selection and schedule promises, over all that are registered."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import PatternError, Pruner, SparsityConfig, summarize
from hf_sparse.config.sparsity import PATTERNS, SCHEDULES, SCORERS, SELECTIONS
from hf_sparse.pruning.patterns import AssignedLines, Lines
from hf_sparse.pruning.patterns.kernel_position import Positions
from hf_sparse.pruning.selection import Owl
from hf_sparse.pruning.selection.budget import Budget, Costs

WITHIN_ROWS = {"per_row", "owl"}
"""Selections in which the weights of a row compete with each other alone."""
SHAPE = (64, 96)
OPTIONS: dict[str, dict[str, Any]] = {"block": {"rows": 8, "cols": 16}}


def spec(name: str) -> dict[str, Any]:
    return {"name": name, **OPTIONS.get(name, {})}


class T5DenseActDense(nn.Sequential):
    """Layers with names that an architecture knows."""

    def __init__(self) -> None:
        names = ("wi", "act", "wo")
        layers = (nn.Linear(SHAPE[1], SHAPE[0]), nn.ReLU(), nn.Linear(SHAPE[0], 64))
        super().__init__(OrderedDict(zip(names, layers, strict=True)))


class T5Attention(nn.Module):
    """An attention to one place, with names that an architecture knows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(SHAPE[1], SHAPE[0]) for _ in range(3))
        self.o, self.key_value_proj_dim = nn.Linear(SHAPE[0], SHAPE[1]), 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.sigmoid(self.q(x) * self.k(x)) * self.v(x))


class VGG(nn.Module):
    """Convolutions with names that an architecture knows."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(SHAPE[1], SHAPE[0], 1), nn.ReLU(), nn.Conv1d(SHAPE[0], 64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.features(x)
        return out


def model_for(pattern: str) -> nn.Module:
    """Return a model whose groups are all equally large, so that a fraction of them is that fraction of the weights."""
    if pattern == "kernel_position":
        return nn.Sequential(nn.Unflatten(1, (SHAPE[1] // 4, 4)), nn.Conv1d(SHAPE[1] // 4, SHAPE[0], 4))
    if pattern == "filter":
        return nn.Sequential(nn.Unflatten(1, (SHAPE[1], 1)), VGG())
    if not PATTERNS[pattern].structural:
        return nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]), nn.ReLU(), nn.Linear(SHAPE[0], 64))
    return (
        nn.Sequential(T5DenseActDense()) if pattern == "neuron" else nn.Sequential(*(T5Attention() for _ in range(4)))
    )


@pytest.mark.parametrize("pattern", list(PATTERNS))
@pytest.mark.parametrize("scorer", [name for name in SCORERS if SCORERS[name].source not in ("heads", "inputs")])
def test_every_scorer_works_with_every_pattern(scorer: str, pattern: str) -> None:
    model = model_for(pattern)
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
        for member in unit.members:
            groups = member.pattern.pool(member.masked.mask.float())
            assert set(groups.view(-1).tolist()) <= {0.0, 1.0}  # a group is kept or removed as a whole
            assert torch.equal(groups == 1.0, unit.kept())  # in all its members
    pruner.finish()
    pruner.bake()
    assert summarize(model).sparsity == pytest.approx(asked, abs=0.02)


@pytest.mark.parametrize(
    "made",
    [PATTERNS.build(spec(name)) for name in PATTERNS if not PATTERNS[name].structural and name != "kernel_position"]
    + [Positions(4), Positions(4, by_filter=True)]
    + [Lines(axis, size) for size in (0, 8) for axis in (0, 1)]
    + [AssignedLines(axis, 8, tuple(range(8)) * (SHAPE[axis] // 8)) for axis in (0, 1)],
    ids=str,
)
def test_every_pattern_pools_and_expands_consistently(made: Any) -> None:
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

    def select() -> list[torch.Tensor]:
        made = SELECTIONS.build(selection)
        if isinstance(made, Owl):
            made.prepare_outliers([0.5, 0.5], [400, 600])
        if not isinstance(made, Budget):
            return made.select(scores, 0.9)
        # Every group costs the same here, so a tenth of the cost is a tenth of the groups.
        made = Budget(of="parameters", remaining=0.1)
        made.prepare([Costs("feed_forward", 1, tensor.numel(), 1, 1) for tensor in scores])
        return made.select(scores, 1.0)

    kept = select()
    assert [mask.shape for mask in kept] == [tensor.shape for tensor in scores]
    assert sum(int(mask.sum()) for mask in kept) == 100
    for mask, tensor in zip(kept, scores, strict=True):
        rows = zip(tensor, mask, strict=True) if selection in WITHIN_ROWS else [(tensor, mask)]
        assert all(float(row[kept_here].min()) >= float(row[~kept_here].max()) for row, kept_here in rows)
    assert all(torch.equal(a, b) for a, b in zip(kept, select(), strict=True))


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_schedule_starts_low_never_falls_and_ends_where_asked(schedule: str) -> None:
    made = SCHEDULES.build(schedule)
    values = [made(step / 200, 0.9) for step in range(201)]
    assert values == sorted(values)
    assert values[0] == (0.9 if schedule == "constant" else 0.0)
    assert values[-1] == 0.9
    assert all(value == 0.9 for step, value in enumerate(values) if made.reached(step / 200))
