from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from hf_sparse import Pruner, RecipeError, SparsityConfig, SparsityError, compact, sparsify, summarize
from hf_sparse.modeling.model_state import sparse_weights
from hf_sparse.modeling.zero_preservation import keeps_zeros
from hf_sparse.pruning.mask_state_dict import bake_mask
from tests.helpers.layers import one_layer, two_layers
from tests.helpers.training import bert


def test_sparsify_keeps_the_largest_weights_and_hands_back_the_same_model() -> None:
    model = one_layer([[1.0, -4.0], [3.0, -2.0]])
    parameter = model[0].weight
    assert sparsify(model, SparsityConfig(targets="*", sparsity=0.5)) is model
    assert model[0].weight.tolist() == [[0.0, -4.0], [3.0, 0.0]]
    assert model[0].weight is parameter
    assert parameter.requires_grad
    assert type(model[0]) is nn.Linear


def test_order_of_parameters_stays(tmp_path: Path) -> None:
    # The state of an optimizer knows parameters by their place alone.
    model = bert()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsify(model, SparsityConfig(sparsity=0.5))
    assert [name for name, _ in model.named_parameters()] == names
    sparsify(model, SparsityConfig(sparsity=0.5, pattern="head+neuron"))
    assert [name for name, _ in model.named_parameters()] == names
    compact(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert [*model.state_dict()] == [*bert().state_dict()]
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert [name for name, _ in loaded.named_parameters()] == names
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss.backward()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.step()
    other = torch.optim.AdamW(loaded.parameters(), lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    loaded(torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss.backward()
    other.step()
    shapes = {name: other.state[own]["exp_avg"].shape for name, own in loaded.named_parameters()}
    assert shapes == {name: own.shape for name, own in loaded.named_parameters()}


@pytest.mark.parametrize("bias", [True, False])
def test_order_of_parameters_of_a_layer_stays(bias: bool) -> None:
    layer: Any = nn.Linear(4, 4, bias=bias)
    layer.register_parameter("more", nn.Parameter(torch.zeros(1)))
    model = nn.Sequential(layer)
    names = [name for name, _ in model.named_parameters()]
    pruner = Pruner(model, SparsityConfig(targets="*", sparsity=0.5)).attach()
    pruner.detach()
    assert [name for name, _ in model.named_parameters()] == names
    pruner.attach().step(1.0)
    twin = copy.deepcopy(model)
    pruner.bake()
    assert [name for name, _ in model.named_parameters()] == names
    bake_mask(twin[0])
    assert [name for name, _ in twin.named_parameters()] == names


def test_sparsify_goes_to_the_final_sparsity_whatever_the_schedule() -> None:
    model = two_layers()
    sparsify(model, SparsityConfig(targets="*", sparsity=0.75, schedule={"name": "cubic", "begin": 0.9, "end": 1.0}))
    assert [weight.nonzeros for weight in summarize(model).weights] == [32, 32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "head", "sparsity": 0.1},
            r"sparsity 0\.1 was requested.* at 0\.25: pattern head .* 4 in each of 2",
        ),
        (
            {"pattern": "head", "sparsity": 0.9},
            r"sparsity 0\.9 was requested.* at 0\.75: .*; selection 'global' rounds",
        ),
        (
            {"pattern": "head", "sparsity": 0.9, "selection": "global"},
            r"at 0\.875: .* 4 in each of 2 places\. A finer .* less$",
        ),
        ({"pattern": "layer", "sparsity": 0.1}, r"sparsity 0\.1 was requested, .* at 0\.25: .* 1 in each of 4 places"),
        ({"pattern": "head", "sparsity": 0.75}, None),
        ({"sparsity": 0.123}, None),
        ({"pattern": "2:4"}, None),
    ],
    ids=str,
)
def test_sparsity_that_whole_groups_do_not_allow_is_named_once(
    options: dict[str, Any], message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = bert()
    sparsify(model, SparsityConfig(**options))
    said = [record.getMessage() for record in caplog.records if "was requested" in record.getMessage()]
    assert len(said) == (message is not None)
    if message is not None:
        assert re.search(message, said[0]), said[0]


def test_sparsify_keeps_the_type_of_the_weights() -> None:
    model = one_layer([[1.0, -4.0], [3.0, -2.0]], torch.bfloat16)
    sparsify(model, SparsityConfig(targets="*", sparsity=0.5))
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].weight.tolist() == [[0.0, -4.0], [3.0, 0.0]]


def test_sparsify_prunes_every_group_in_its_own_way() -> None:
    model = two_layers()
    groups: list[Any] = [{"targets": "0", "sparsity": 0.75, "pattern": "row"}, {"targets": "2", "pattern": "2:4"}]
    sparsify(model, SparsityConfig(groups=groups))
    assert sorted((model[0].weight != 0).sum(1).tolist()) == [0] * 6 + [16] * 2
    assert (model[2].weight != 0).view(-1, 4).sum(1).tolist() == [2] * 32


@pytest.mark.parametrize("scorer", ["movement", "soft_movement"])
def test_sparsify_refuses_scorers_that_learn_and_leaves_the_model(scorer: str) -> None:
    model = two_layers()
    with pytest.raises(RecipeError, match=f"scorer '{scorer}' learns from training, so it cannot prune in one shot"):
        sparsify(model, SparsityConfig(targets="*", sparsity=0.5, scorer=scorer))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("scorer", ["gradient", "taylor", "head_importance"])
def test_sparsify_refuses_scorers_that_look_at_data_without_data(scorer: str) -> None:
    model = two_layers()
    with pytest.raises(RecipeError, match=f"scorer '{scorer}' looks at data"):
        sparsify(model, SparsityConfig(targets="*", sparsity=0.5, scorer=scorer))
    assert type(model[0]) is nn.Linear


def test_sparsify_refuses_data_that_nothing_looks_at() -> None:
    with pytest.raises(RecipeError, match="no scorer looks at data"):
        sparsify(two_layers(), SparsityConfig(targets="*", sparsity=0.5), [{"x": torch.ones(1)}])


@pytest.mark.parametrize("pattern", ["element", "2:4"])
def test_sparsify_refuses_nan_and_leaves_the_model_as_it_was(pattern: str) -> None:
    model = two_layers()
    model[2].weight.data[1, 1] = math.nan
    first = model[0].weight.detach().clone()
    with pytest.raises(SparsityError, match=r"NaN among the scores of .2\.weight."):
        sparsify(
            model, SparsityConfig(groups=[{"targets": name, "sparsity": 0.5, "pattern": pattern} for name in "02"])
        )
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert torch.equal(model[0].weight, first)


def test_sparsify_can_be_repeated_with_more() -> None:
    model = two_layers()
    for sparsity, nonzeros in ((0.5, 64), (0.75, 32)):
        sparsify(model, SparsityConfig(targets="*", sparsity=sparsity))
        assert [weight.nonzeros for weight in summarize(model).weights] == [nonzeros, nonzeros]


@pytest.mark.parametrize(("pattern", "left"), [("head", 2), ("neuron", 32)])
def test_sparsify_removes_whole_heads_and_neurons_of_a_model_that_is_sparse(pattern: str, left: int) -> None:
    model = sparsify(bert(), SparsityConfig(sparsity=0.25))
    edits = compact(sparsify(model, SparsityConfig(pattern=pattern, sparsity=0.5)))
    assert {len(cut.kept) for _, _, cut in edits} == {left}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"sparsity": 0.75}, {"sparsity": 0.5}),
        ({"sparsity": 0.75}, {"sparsity": 0.5, "pattern": "row"}),
        ({"sparsity": 0.75, "pattern": "head"}, {"sparsity": 0.25, "pattern": "head"}),
        ({"sparsity": 0.75, "pattern": "head"}, {"sparsity": 0.25}),
        ({"sparsity": 0.75, "targets": "*attention*"}, {"sparsity": 0.5}),
    ],
)
def test_sparsify_refuses_less_sparsity_than_there_is_and_leaves_the_model(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    model = sparsify(bert(), SparsityConfig(**first))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    marked = sparse_weights(model)
    if second.get("pattern") == "row":  # a row is left while anything in it is
        assert summarize(sparsify(model, SparsityConfig(**second))).sparsity > 0.75
        return
    with pytest.raises(
        RecipeError, match=r"was requested, but '.*' and \d+ more weights are at 0\.7500 since an earlier"
    ):
        sparsify(model, SparsityConfig(**second))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sparse_weights(model) == marked
    kept = [keeps_zeros(module) for name, module in model.named_modules() if f"{name}.weight" in marked]
    assert all(kept)
    assert sum(keeps_zeros(module) for module in model.modules()) == len(marked)


def test_sparsify_takes_the_same_sparsity_again() -> None:
    model = two_layers()
    for _ in range(2):
        sparsify(model, SparsityConfig(targets="*", sparsity=0.5))
    assert [weight.nonzeros for weight in summarize(model).weights] == [64, 64]


def test_sparsify_takes_zeros_that_no_pruning_made() -> None:
    model = two_layers()
    model[0].weight.data[:7] = 0.0
    sparsify(model, SparsityConfig(targets="*", sparsity=0.5))
    assert [weight.nonzeros for weight in summarize(model).weights] == [16, 64]
