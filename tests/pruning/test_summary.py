from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import Pruner, SparsityConfig, SparsityError, sparsify, summarize
from tests.helpers import convolutional
from tests.helpers.layers import attached, one_layer, two_layers
from tests.helpers.training import bert


def pruned() -> Any:
    """Two layers, of which the first, 2 x 10, keeps 5 of 20."""
    model = nn.Sequential(nn.Linear(10, 2), nn.Linear(2, 3, bias=False))
    return sparsify(model, SparsityConfig(targets="0", sparsity=0.75))


def test_summary_counts_by_hand() -> None:
    summary = summarize(pruned())
    (weight,) = summary.weights
    assert (weight.name, weight.shape, weight.parameters, weight.nonzeros) == ("0.weight", (2, 10), 20, 5)
    assert weight.sparsity == summary.sparsity == 0.75
    assert weight.bytes == summary.bytes == 3 + 5 * 4  # 20 bits are 3 bytes
    assert weight.dense_bytes == summary.dense_bytes == 80
    assert summary.model_parameters == 20 + 2 + 6


def test_summary_of_a_wrapped_model_is_that_of_the_model() -> None:
    model = pruned()
    assert summarize(nn.DataParallel(model)) == summarize(model)


def test_summary_prints_a_table() -> None:
    assert str(summarize(pruned())) == (
        "weight                 shape   sparsity      nonzeros      packed\n"
        "-----------------------------------------------------------------\n"
        "0.weight                2x10     75.00%             5      0.0 kB\n"
        "-----------------------------------------------------------------\n"
        "targeted                  20     75.00%             5      0.0 kB\n"
        "model: 28 parameters; targeted weights dense: 0.1 kB"
    )


def test_summary_is_plain_json() -> None:
    data = summarize(pruned()).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data == {
        "sparsity": 0.75,
        "parameters": 20,
        "nonzeros": 5,
        "bytes": 23,
        "dense_bytes": 80,
        "model_parameters": 28,
        "weights": [
            {
                "name": "0.weight",
                "shape": [2, 10],
                "parameters": 20,
                "nonzeros": 5,
                "bytes": 23,
                "dense_bytes": 80,
                "sparsity": 0.75,
                "layer": "Linear",
            }
        ],
        "forms": [],
    }


def test_summary_is_the_same_before_and_after_bake_and_counts_no_scores() -> None:
    model = two_layers()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pruner = attached(model, sparsity=0.75, scorer="movement")
    pruner.step(1.0)
    before = summarize(model)
    assert before == pruner.summary()
    pruner.bake()
    assert summarize(model) == before
    assert before.model_parameters == parameters
    assert [weight.nonzeros for weight in before.weights] == [32, 32]


def test_summary_counts_zeros_of_the_weight_not_of_the_mask() -> None:
    model = one_layer([[0.0, 0.0], [0.0, 2.0]])
    attached(model, sparsity=0.5).step(1.0)
    assert summarize(model).nonzeros == 1


def test_summary_of_a_model_never_pruned_is_of_its_default_targets() -> None:
    summary = summarize(bert())
    assert len(summary.weights) == 2 * 6
    assert summary.sparsity == 0.0
    assert summary.bytes == summary.dense_bytes  # packing would not pay


def test_summary_of_a_model_without_targets_is_empty() -> None:
    summary = summarize(two_layers())
    assert (summary.weights, summary.parameters, summary.sparsity, summary.bytes) == ((), 0, 0.0, 0)
    assert "targeted" in str(summary)


def test_summary_of_names_is_of_these_alone() -> None:
    assert [weight.name for weight in summarize(pruned(), ["1.weight", "0.bias"]).weights] == ["1.weight", "0.bias"]


@pytest.mark.parametrize("name", ["5.weight", "0.wait", "0", "", "training"])
def test_summary_refuses_names_of_no_weight(name: str) -> None:
    with pytest.raises(SparsityError, match=f"the model has no weight '{name}'"):
        summarize(pruned(), [name])


def test_summary_counts_tied_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert summarize(model).model_parameters == 16


def test_summary_counts_bytes_in_the_type_of_the_weight() -> None:
    model = one_layer([[1.0, 2.0, 3.0, 4.0]], torch.bfloat16)
    sparsify(model, SparsityConfig(targets="*", sparsity=0.5))
    assert (summarize(model).bytes, summarize(model).dense_bytes) == (1 + 2 * 2, 8)


def test_layers_that_are_no_linear_ones_are_named_while_masks_are_on_and_after() -> None:
    model = convolutional.build("vgg")
    pruner = Pruner(model, SparsityConfig(sparsity=0.5, targets="*features*")).attach()
    pruner.step(1.0)
    for _ in range(2):
        summary = summarize(model)
        assert {weight.layer for weight in summary.weights} == {"Conv2d"}
        assert "Conv2d: 3 weights, 1,314 parameters, 50.00% zeros, packed " in str(summary)
        if pruner.attached:
            pruner.bake()


def test_forms_are_counted_with_what_they_hold() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 16))
    groups: list[dict[str, Any]] = [
        {"targets": "0", "compress": {"name": "hashed", "ratio": "1/8"}},
        {"targets": "1", "compress": {"name": "low_rank", "rank": 2}},
        {"targets": "2", "scorer": "wanda", "sparsity": 0.5, "compress": {"name": "low_rank", "rank": 3}},
    ]
    sparsify(model, SparsityConfig(groups=groups), [{"input": torch.randn(4, 16)}])
    summary = summarize(model)
    found = {form.name: (form.form, form.entries, form.parameters, form.bytes) for form in summary.forms}
    assert found == {
        "0": ("hashed", 128, 16, 64), "1": ("low_rank", 128, 48, 192), "2": ("sparse_low_rank", 256, 96, 384),
    }  # fmt: skip
    assert [weight.name for weight in summary.weights] == ["2.weight"]
    assert "hashed: 1 layers, 16 values for 128 entries, 0.1 kB" in str(summary)
    assert [form["name"] for form in summary.to_dict()["forms"]] == ["0", "1", "2"]
