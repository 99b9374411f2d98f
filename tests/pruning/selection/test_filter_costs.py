"""Budgets of filters: counted as the compacted model counts, spent on the highest scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import PatternError, SparsityConfig, compact, sparsify
from hf_sparse.config.sparsity import PATTERNS
from hf_sparse.modeling.architectures import known_filters
from hf_sparse.pruning.selection.filter_costs import FilterCosts, Layer
from hf_sparse.pruning.unit_finding import find_units
from tests.helpers.convolutional import TinyVGGConfig, TinyVGGForImageClassification, build, outputs

CHAIN = FilterCosts([Layer(108, own=0), Layer(108, own=1, reads=0), Layer(96, reads=1)], filters=[4, 3])
"""Convolutions of 4 x 3 and 3 x 4 kernels of 9, and a linear layer of 8 x 12: 312 weights."""


def test_what_is_left_by_hand() -> None:
    assert CHAIN.left([4, 3]) == 1.0
    assert CHAIN.left([2, 3]) == pytest.approx((54 + 54 + 96) / 312)
    assert CHAIN.left([2, 1]) == pytest.approx((54 + 18 + 32) / 312)


def test_costs_of_a_model_are_those_of_its_layers() -> None:
    model = TinyVGGForImageClassification(TinyVGGConfig(widths=(4, 3)))
    units = find_units(model, PATTERNS.build("filter"), None, ())
    found = FilterCosts.of(units, 1)
    assert (list(found.layers), list(found.filters)) == (list(CHAIN.layers), list(CHAIN.filters))


def test_highest_scores_are_kept_within_the_limit_and_one_of_each_unit() -> None:
    scores = [torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([0.5, 0.1, 0.3])]
    kept, left = CHAIN.highest(scores, 0.4)
    # In order: the highest of each, then 3, 2, 1 of the first, then 0.3: with two and one left it is 104 of 312, with
    # three and one 81 + 27 + 32 = 140.
    assert [mask.tolist() for mask in kept] == [[True, False, True, False], [True, False, False]]
    assert left == pytest.approx(104 / 312)
    kept, left = CHAIN.highest(scores, 0.45)
    assert [mask.tolist() for mask in kept] == [[True, False, True, True], [True, False, False]]
    assert left == pytest.approx(140 / 312)
    kept, left = CHAIN.highest(scores, 0.01)  # not to be had
    assert [int(mask.sum()) for mask in kept] == [1, 1]


def weights(model: Any) -> int:
    layers = {id(layer): layer for block in known_filters(model) for layer in (block.module, block.output)}
    return sum(layer.weight.numel() for layer in layers.values())


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("remaining", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", ["vgg", "resnet-bottleneck"])
def test_compacted_model_has_what_the_budget_counted(name: str, remaining: float, multiple: int) -> None:
    model = build(name)
    with torch.no_grad():  # filters of very different sizes, so that layers keep different fractions
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= torch.rand(len(module.weight), 1, 1, 1)
    before = weights(model)
    config = SparsityConfig(
        pattern={"name": "filter", "multiple_of": multiple},
        selection={"name": "budget", "of": "parameters", "remaining": remaining},
    )
    sparsify(model, config)
    expected = outputs(model)
    edits = compact(model)
    torch.testing.assert_close(outputs(model), expected, atol=1e-4, rtol=1e-4)
    assert all(cut.count % multiple == 0 for _, _, cut in edits)
    spent = weights(model) / before
    assert spent <= remaining
    assert spent > remaining - 0.15  # a chunk more would not fit


def test_budget_that_cannot_be_kept_is_refused() -> None:
    selection = {"name": "budget", "of": "parameters", "remaining": 0.1}
    sparsify(build("vgg"), SparsityConfig(pattern="filter", selection=selection))
    with pytest.raises(PatternError, match=r"cannot leave 0.1 .* at least 4 filters, and then 0\.\d+ are"):
        sparsify(build("vgg"), SparsityConfig(pattern={"name": "filter", "multiple_of": 4}, selection=selection))


@pytest.mark.parametrize("of", ["flops", "latency"])
def test_budgets_that_depend_on_the_size_of_images_are_refused(of: str) -> None:
    with pytest.raises(PatternError, match=f"of {of} does not know what a filter costs, which depends on the size"):
        sparsify(build("vgg"), SparsityConfig(pattern="filter", selection={"name": "budget", "of": of}))
