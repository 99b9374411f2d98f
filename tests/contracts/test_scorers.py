"""What every scorer promises beyond counts: a run that is interrupted goes on as if it had not been."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_sparse.config.sparsity import SCORERS
from hf_sparse.pruning.masked_weight import hidden
from hf_sparse.pruning.state_fields import state_suffixes
from tests.helpers.layers import attached, two_layers

# Those that measure heads, or the inputs of layers, on data have no part in training.
TRAINED = [name for name in SCORERS if SCORERS[name].source not in ("heads", "inputs")]


@pytest.mark.parametrize("scorer", TRAINED)
def test_scorer_goes_on_from_a_state_dict_as_if_uninterrupted(scorer: str) -> None:
    schedule = {"name": "cubic", "begin": 0.0, "end": 0.9}

    def run(interrupted: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = two_layers()
        pruner = attached(model, scorer=scorer, sparsity=0.75, schedule=schedule)
        pruner.step(0.0)
        for step in range(10):
            if interrupted and step == 5:
                saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                model = two_layers()
                pruner = attached(model, scorer=scorer, sparsity=0.75, schedule=schedule)
                assert model.load_state_dict(saved) == ([], [])
            optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)  # it remembers nothing itself
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            ((model(x) - 1.0).square().mean() + pruner.penalty()).backward()
            pruner.observe()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step((step + 1) / 10)
        masked = [unit.masked.mask for unit in pruner.units]
        return masked, [hidden(unit.module).detach() for unit in pruner.units]

    for plain, resumed in zip(run(False), run(True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, resumed, strict=True))


@pytest.mark.parametrize("scorer", TRAINED)
def test_scorer_state_has_endings_that_savers_know(scorer: str) -> None:
    """Keys with other endings would be taken for weights of the model, and written into what people load."""
    model = two_layers()
    plain = set(model.state_dict())
    pruner = attached(model, scorer=scorer, sparsity=0.75)
    added = set(model.state_dict()) - plain
    assert added
    assert all(key.endswith(state_suffixes()) and key[: key.rindex("_")] in plain for key in added)
    pruner.bake()
    assert set(model.state_dict()) == plain


@pytest.mark.parametrize("scorer", list(SCORERS))
def test_scorer_options_are_plain_values_with_defaults(scorer: str) -> None:
    for field in dataclasses.fields(SCORERS[scorer]):
        if field.init:
            assert isinstance(field.default, (int, float, str, type(None))), field.name


@pytest.mark.parametrize("scorer", TRAINED)
def test_scorer_leaves_the_random_state_of_training_alone(scorer: str) -> None:
    pruner = attached(two_layers(), scorer=scorer, sparsity=0.75)
    before = torch.get_rng_state()
    pruner.step(1.0)
    assert torch.equal(torch.get_rng_state(), before)
