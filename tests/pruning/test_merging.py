"""Merging of experts: clusters and weights by hand, copies merge without a trace, the router follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_sparse import PatternError, RecipeError, SparsityError, merge_experts
from hf_sparse.modeling.architectures import known_experts
from hf_sparse.pruning.merging import clustered
from tests.helpers import decoders
from tests.modeling.architectures.test_decoders import CLOSE, generate, logits


def set_expert(block: Any, expert: int, source: int, order: Tensor | None = None) -> None:
    """Make an expert a copy of another, its neurons in another order, chosen by the same row of the router."""
    wide, narrow = block.experts.gate_up_proj, block.experts.down_proj
    size = narrow.shape[-1]
    order = torch.arange(size) if order is None else order
    wide.data[expert] = wide.data[source][torch.cat([order, order + size])]
    narrow.data[expert] = narrow.data[source][:, order]
    block.router.weight.data[expert] = block.router.weight.data[source]


@pytest.mark.parametrize("family", decoders.MOE)
def test_copies_with_their_neurons_in_another_order_merge_into_the_one_they_are(family: str) -> None:
    model = decoders.build(family, num_experts_per_tok=1)
    for block in known_experts(model):
        size = block.experts.down_proj.shape[-1]
        set_expert(block, 3, 0, torch.randperm(size, generator=torch.Generator().manual_seed(1)))
    before = [(b.experts.gate_up_proj.clone(), b.router.weight.clone()) for b in known_experts(model)]
    # A token that would go to one of the two goes to their mean, which is each of them.
    expected, tokens = logits(model), generate(model)
    edits = merge_experts(model, [decoders.batch()], sparsity=0.25)
    assert all(block.groups == 3 for block in known_experts(model))
    assert not any(cut.kept == (0, 3) for cut in edits.experts.values())
    for block, (wide, rows) in zip(known_experts(model), before, strict=True):
        kept = edits.experts[block.name].kept
        assert {1, 2} < set(kept)
        torch.testing.assert_close(block.experts.gate_up_proj, wide[list(kept)])
        torch.testing.assert_close(block.router.weight, rows[list(kept)])
    renormalized = family == "mixtral" or getattr(model.config, "norm_topk_prob", False)
    if renormalized:  # else the weight of the one expert is its share among all, which a copy has halved
        torch.testing.assert_close(logits(model), expected, **CLOSE)
        assert generate(model) == tokens


def test_cluster_weights_and_router_rows_by_hand() -> None:
    model = decoders.build("mixtral")
    block = known_experts(model)[1]
    seen: dict[str, Tensor] = {}
    block.module.register_forward_pre_hook(lambda module, inputs: seen.update(hidden=inputs[0]))
    batch = decoders.batch()
    logits(model)
    model(**batch)
    hidden = seen["hidden"][batch["attention_mask"].bool()]
    gate_up, down = block.experts.gate_up_proj.detach().clone(), block.experts.down_proj.detach().clone()
    rows = block.router.weight.detach().clone()
    means = []
    for expert in range(4):
        gate, up = (hidden @ gate_up[expert].T).chunk(2, dim=-1)
        means.append(((F.silu(gate) * up) @ down[expert].T).mean(0))
    distance = torch.cdist(torch.stack(means), torch.stack(means)) + 1e9 * torch.eye(4)
    first, second = sorted(divmod(int(distance.argmin()), 4))
    chosen = (hidden @ rows.T).topk(2).indices.flatten().bincount(minlength=4)
    leader, other = (first, second) if chosen[first] >= chosen[second] else (second, first)
    share = float(chosen[leader] / (chosen[leader] + chosen[other]))

    edits = merge_experts(model, [batch], sparsity=0.25)
    kept = edits.experts[block.name].kept
    assert set(kept) == {0, 1, 2, 3} - {other}
    place = kept.index(leader)
    torch.testing.assert_close(block.router.weight[place], share * rows[leader] + (1 - share) * rows[other])
    # The best of all orders of the other's neurons, one after the other.
    size = down.shape[-1]
    found_up = block.experts.gate_up_proj[place]
    matched = (found_up - share * gate_up[leader]) / (1 - share)
    order = torch.cdist(matched[:size], gate_up[other][:size]).argmin(1)
    assert sorted(order.tolist()) == list(range(size))
    torch.testing.assert_close(matched, gate_up[other][torch.cat([order, order + size])], atol=1e-4, rtol=1e-4)
    expected = share * down[leader] + (1 - share) * down[other][:, order]
    torch.testing.assert_close(block.experts.down_proj[place], expected)
    for expert in set(kept) - {leader}:
        assert torch.equal(block.experts.down_proj[kept.index(expert)], down[expert])


@pytest.mark.parametrize("family", decoders.MOE)
def test_merged_model_is_a_plain_one(family: str, tmp_path: Path) -> None:
    model = decoders.build(family).train()
    merge_experts(model, [decoders.batch()], sparsity=0.5)
    assert model.training
    assert getattr(model.config, "num_local_experts" if family == "mixtral" else "num_experts") == 2
    model.eval().save_pretrained(tmp_path)
    assert "hf_sparse" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)
    assert generate(plain) == generate(model)


def test_padding_does_not_count() -> None:
    models = [decoders.build("qwen3-moe") for _ in range(2)]
    batch = decoders.batch()
    mask = batch["attention_mask"].bool()
    other = {**batch, "input_ids": torch.where(mask, batch["input_ids"], 3)}
    edits = [merge_experts(model, [own], 0.5) for model, own in zip(models, (batch, other), strict=True)]
    assert edits[0] == edits[1]
    for left, right in zip(known_experts(models[0]), known_experts(models[1]), strict=True):
        torch.testing.assert_close(left.experts.gate_up_proj, right.experts.gate_up_proj)


def test_nothing_to_merge_changes_nothing() -> None:
    model = decoders.build("mixtral")
    before = logits(model)
    assert not merge_experts(model, [decoders.batch()], sparsity=0.0)
    assert torch.equal(logits(model), before)


def test_experts_without_tokens_have_equal_shares() -> None:
    assert clustered(torch.tensor([[0.0], [1.0], [1.0]]), 3) == [[0], [1], [2]]
    assert sorted(map(len, clustered(torch.zeros(4, 2), 2))) == [1, 3]  # ties: still as many as asked for


def test_what_cannot_be_merged_is_refused_and_changes_nothing() -> None:
    model = decoders.build("mixtral")
    before = logits(model)
    with pytest.raises(RecipeError, match=r"leaves 1 of the 4 experts of 'model\.layers\.0\.mlp'.* each token to 2"):
        merge_experts(model, [decoders.batch()], sparsity=0.75)
    with pytest.raises(SparsityError, match="there was no batch"):
        merge_experts(model, [], sparsity=0.25)
    with pytest.raises(PatternError, match=r"merging experts needs to know"):
        merge_experts(decoders.build("llama"), [decoders.batch()], sparsity=0.25)
    with pytest.raises(RecipeError, match=r"`sparsity` must be in \[0, 1\), got 1"):
        merge_experts(model, [decoders.batch()], sparsity=1)
    assert torch.equal(logits(model), before)
