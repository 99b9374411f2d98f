"""RigL and SET by hand: what is dropped, what grows, from which value, when, and that nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import TrainerCallback

from hf_sparse import RecipeError, SparsityConfig
from hf_sparse.config.sparsity import SCORERS
from hf_sparse.pruning.masked_weight import MaskedWeight, hidden, masked_weight
from tests.helpers.layers import attached, one_layer, two_layers
from tests.helpers.training import sparse_trainer

WEIGHT = [[4.0, 3.0, 0.5, 0.4, 2.0, 0.1, 0.3, 0.2]]
RIGL = {"name": "rigl", "fraction": 0.5, "every": 2, "until": 0.9}


def trained(model: Any, pruner: Any, gradient: list[list[float]], progress: float) -> list[list[bool]]:
    """One step whose loss has this gradient, at learning rate 0."""
    model.zero_grad()
    (model[0].weight * torch.tensor(gradient)).sum().backward()
    pruner.observe()
    pruner.step(progress)
    masked = masked_weight(model[0])
    assert masked is not None
    kept: list[list[bool]] = masked.mask.tolist()
    return kept


def kept(*places: int) -> list[list[bool]]:
    return [[place in places for place in range(8)]]


def test_rigl_drops_the_smallest_and_grows_the_largest_gradient_from_zero() -> None:
    model = one_layer(WEIGHT)
    pruner = attached(model, scorer=RIGL, sparsity=0.5)
    pruner.step(0.0)
    assert masked_weight(model[0]).mask.tolist() == kept(0, 1, 2, 4)  # type: ignore[union-attr]
    gradient = [[9.0, 9.0, 9.0, 0.1, 9.0, 0.2, -5.0, 0.3]]
    assert trained(model, pruner, gradient, 0.0) == kept(0, 1, 2, 4)  # renewal 1 is no update
    # The fraction is 0.5/2 (1 + cos 0) = 0.5: two of four go, 0.5 and 2.0. Of all that are not kept then, 0.5 and 2.0
    # have the largest gradients, and grow again with their values.
    assert trained(model, pruner, gradient, 0.0) == kept(0, 1, 2, 4)
    assert hidden(model[0]).tolist() == torch.tensor(WEIGHT).tolist()
    gradient = [[9.0, 9.0, 0.0, 0.1, 0.0, 0.2, -5.0, 0.3]]
    assert trained(model, pruner, gradient, 0.0) == kept(0, 1, 2, 4)
    assert trained(model, pruner, gradient, 0.0) == kept(0, 1, 6, 7)
    found = hidden(model[0])
    assert found.tolist() == [pytest.approx([4.0, 3.0, 0.5, 0.4, 2.0, 0.1, 0.0, 0.0])]
    assert model[0].weight.tolist() == [[4.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def test_rigl_changes_less_and_less_and_nothing_in_the_end() -> None:
    scorer = SCORERS["rigl"](fraction=0.4, every=1, until=0.8)
    assert scorer.share(0.0) == pytest.approx(0.4)
    assert scorer.share(0.4) == pytest.approx(0.2)
    assert scorer.share(0.2) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    scorer.shared_state(1)
    scorer.renewals += 1
    assert scorer.updates(0.79)
    assert not scorer.updates(0.8)


def test_tiny_gradients_are_told_apart() -> None:
    model = one_layer(WEIGHT)
    pruner = attached(model, scorer={**RIGL, "every": 1, "fraction": 0.3}, sparsity=0.5)
    pruner.step(0.0)
    # One of four is dropped; 1e-12 and 2e-12 are the same number beside 1.
    assert trained(model, pruner, [[0, 0, 0, 1e-12, 0, 2e-12, 0, 0]], 0.0) == kept(0, 1, 4, 5)


def test_set_grows_at_random_the_same_for_a_seed_and_not_the_same_each_time() -> None:
    def masks(seed: int) -> list[Any]:
        model = two_layers()
        pruner = attached(model, scorer={"name": "set", "fraction": 0.5, "every": 1, "seed": seed}, sparsity=0.75)
        pruner.step(0.0)
        seen = []
        for _ in range(3):
            pruner.step(0.1)
            seen.append(masked_weight(model[0]).mask.clone())  # type: ignore[union-attr]
        return seen

    torch.manual_seed(0)
    one = masks(1)
    assert [int(mask.sum()) for mask in one] == [32] * 3
    assert not torch.equal(one[0], one[1])
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one, masks(1), strict=True))
    torch.manual_seed(0)
    assert not torch.equal(one[0], masks(2)[0])


@pytest.mark.parametrize("selection", ["uniform", "global"])
@pytest.mark.parametrize("pattern", ["element", "2:4", "row", {"name": "block", "rows": 4, "cols": 4}])
@pytest.mark.parametrize("scorer", ["rigl", "set"])
def test_sparsity_is_exact_at_every_step(scorer: str, pattern: Any, selection: str) -> None:
    if pattern == "2:4" and selection == "global":
        pytest.skip("2:4 has a selection of its own")
    group = {} if pattern == "2:4" else {"selection": selection}
    torch.manual_seed(0)
    model = two_layers()
    pruner = attached(
        model, scorer={"name": scorer, "every": 2, "fraction": 0.5}, sparsity=0.5, pattern=pattern, **group
    )
    optimizer = torch.optim.Adam(pruner.parameter_groups(), lr=0.1)
    pruner.step(0.0)
    first = [unit.masked.mask.clone() for unit in pruner.units]
    for step in range(10):
        model(torch.randn(4, 16)).square().mean().backward()
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / 10)
        groups = [unit.kept() for unit in pruner.units]
        assert 2 * sum(int(one.sum()) for one in groups) == sum(one.numel() for one in groups)
    last = [unit.masked.mask for unit in pruner.units]
    assert not all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize(("scorer", "every"), [("rigl", 1), ({"name": "set", "every": 5}, 3)])
def test_a_training_too_short_to_regrow_anything_is_refused(scorer: Any, every: int, tmp_path: Path) -> None:
    config = SparsityConfig(sparsity=0.8, scorer=scorer, schedule={"name": "constant", "every": every})
    trainer = sparse_trainer(tmp_path, config)
    with pytest.raises(RecipeError, match=r"at step (100|15) for the first time, but until=0\.75 of the 20 steps"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("scorer", ["rigl", "set"])
def test_a_resumed_training_with_updates_is_the_uninterrupted_one(scorer: str, tmp_path: Path) -> None:
    config = SparsityConfig(sparsity=0.8, scorer={"name": scorer, "every": 3}, schedule="constant")
    counts: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            layers = [masked_weight(module) for module in model.modules()]
            counts.append(sum(int(masked.mask.sum()) for masked in layers if masked is not None))

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 9}  # right after an update
    whole = sparse_trainer(tmp_path, config, callbacks=[Watch()], **options)
    whole.train()
    # A fifth, rounded down, of eight weights of 1,024 and of four of 2,048; grown weights count, though they are 0.
    assert counts == [8 * 204 + 4 * 409] * 20
    resumed = sparse_trainer(tmp_path, config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fraction": 1.0}, r"`fraction` must be in \(0, 1\), got 1\.0"),
        ({"until": 0}, r"`until` must be in \(0, 1\), got 0"),
        ({"every": 0}, "`every` must be a positive integer, got 0"),
        ({"seed": -1}, r"`seed` must be an integer in \[0, 2\*\*63\), got -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        SCORERS.build({"name": "set", **options})


def test_a_selection_that_decides_the_sparsity_is_refused() -> None:
    with pytest.raises(RecipeError, match="at the scheduled sparsity, but selection 'threshold'"):
        attached(two_layers(), scorer="set", selection={"name": "threshold", "value": 0.1})


def test_rigl_looks_at_the_gradient_of_updates_alone_and_keeps_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []
    gather = MaskedWeight.gather
    config = SparsityConfig(
        sparsity=0.8, scorer={"name": "rigl", "every": 5, "until": 0.7, "fraction": 0.5}, schedule="constant"
    )
    trainer = sparse_trainer(tmp_path, config, save_strategy="steps", save_steps=5, gradient_accumulation_steps=2)

    def note(self: MaskedWeight, gradient: torch.Tensor) -> None:
        gathered.append(trainer.state.global_step + 1)
        gather(self, gradient)

    monkeypatch.setattr(MaskedWeight, "gather", note)
    trainer.train()
    # Updates at the end of steps 5 and 10 (15 is behind 0.7 of 20), each of two batches and twelve weights.
    assert gathered == [5] * 24 + [10] * 24
    keys = safetensors.torch.load_file(tmp_path / "checkpoint-5" / "model.safetensors").keys()
    assert any(key.endswith("_renewals") for key in keys)
    assert not any(key.endswith("_importance") for key in keys)
