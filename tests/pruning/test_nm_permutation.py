"""Permuting for n:m: the model computes what it did, and n:m keeps more of the layers whose inputs could move."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import PatternError, Pruner, RecipeError, SparsityConfig
from hf_sparse.modeling.architectures import find_sub_blocks
from hf_sparse.pruning.nm_permutation import best_order, permute_for_nm
from tests.helpers.structures import batch, build

WIDER: dict[str, dict[str, int]] = {
    "bert": {"hidden_size": 32, "intermediate_size": 48},
    "t5": {"d_kv": 8, "d_ff": 48},
    "t5-gated": {"d_kv": 8, "d_ff": 48},
}


def kept(weight: Tensor, n: int, m: int) -> float:
    """By hand: the share of the sum of absolute values that the n highest of every m have."""
    groups = weight.detach().abs().double().view(-1, m)
    return float(groups.sort(dim=1, descending=True).values[:, :n].sum() / groups.sum())


@pytest.mark.parametrize(
    ("family", "n", "m"), [("bert", 2, 4), ("t5", 2, 4), ("t5-gated", 2, 4), ("bert", 1, 4), ("bert", 2, 8)]
)
def test_outputs_stay_and_more_is_kept(family: str, n: int, m: int) -> None:
    model = build(family, **WIDER[family])
    inputs = batch(family)
    before = model(**inputs).logits.detach()
    shares = {block.output_name: kept(block.output.weight, n, m) for block in find_sub_blocks(model, "a test")}
    report = permute_for_nm(model, n, m, rounds=8)
    assert float((model(**inputs).logits - before).detach().abs().max()) < 1e-5
    assert [entry.name for entry in report] == [f"{name}.weight" for name in shares]
    for entry, block in zip(report, find_sub_blocks(model, "a test"), strict=True):
        assert entry.before == pytest.approx(shares[block.output_name], rel=1e-5)
        assert entry.after == pytest.approx(kept(block.output.weight, n, m), rel=1e-5)
        assert entry.after >= entry.before - 1e-7
        if block.kind == "feed_forward":
            assert entry.after > entry.before + 0.001
    assert "->" in str(report[0])


def test_only_the_value_rows_and_output_columns_of_a_head_move_within_it() -> None:
    model, old = (build("bert", **WIDER["bert"]) for _ in range(2))
    permute_for_nm(model, rounds=5)
    new, was = (
        next(block for block in find_sub_blocks(m, "a test") if block.kind == "attention") for m in (model, old)
    )
    for name in list(new.inputs)[:2]:
        assert torch.equal(new.inputs[name].weight, was.inputs[name].weight)
    assert not torch.equal(new.output.weight, was.output.weight)
    for head in range(new.groups):
        columns = slice(head * new.size, (head + 1) * new.size)
        assert torch.equal(new.output.weight[:, columns].sort(1).values, was.output.weight[:, columns].sort(1).values)
    # Rows of the residual stream, its embeddings and norms are not touched.
    assert torch.equal(new.output.bias, was.output.bias)


def test_every_process_finds_the_same_order_and_the_global_state_is_left_alone() -> None:
    size = torch.rand(32, 64)
    state = torch.get_rng_state()
    first = best_order(size, 2, 4)
    torch.rand(3)
    assert torch.equal(best_order(size, 2, 4), first)
    torch.set_rng_state(state)
    best_order(size, 2, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(first.tolist()) == list(range(64))


def test_two_groups_are_shared_out_in_the_best_way() -> None:
    size = torch.rand(5, 8)
    best = max(
        kept(size[:, [*half, *(i for i in range(8) if i not in half)]], 2, 4)
        for half in itertools.combinations(range(8), 4)
    )
    assert kept(size[:, best_order(size, 2, 4, rounds=1)], 2, 4) == pytest.approx(best, rel=1e-6)


def test_columns_stay_in_their_segment() -> None:
    order = best_order(torch.rand(16, 48), 2, 4, segments=3)
    for segment in range(3):
        assert sorted(order[16 * segment : 16 * segment + 16].tolist()) == list(range(16 * segment, 16 * segment + 16))


def test_layers_that_do_not_fit_are_left_as_they_are() -> None:
    model = build("bert", intermediate_size=50, hidden_size=32)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = permute_for_nm(model, rounds=3)
    assert all("attention" in entry.name for entry in report)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, old["bert.encoder.layer.0.output.dense.weight"])


@pytest.mark.parametrize(("n", "m"), [(4, 4), (0, 4), (2.0, 4), (2, True)])
def test_no_pattern_is_an_error(n: Any, m: Any) -> None:
    with pytest.raises(RecipeError, match="1 <= n < m"):
        permute_for_nm(build("bert"), n, m)


def test_unknown_models_and_masked_weights_are_refused_and_nothing_is_moved() -> None:
    with pytest.raises(PatternError, match="permuting for n:m"):
        permute_for_nm(nn.Sequential(nn.Linear(8, 8)))
    model = build("bert", **WIDER["bert"])
    Pruner(model, SparsityConfig(sparsity=0.5, targets="*layer.1.output.dense", scorer="magnitude")).attach()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match="already has a mask"):
        permute_for_nm(model)
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
