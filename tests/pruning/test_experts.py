"""Experts: REAP's criterion by hand; a mixture without some experts is one whose router cannot choose them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_sparse import (
    CheckpointError,
    Edits,
    PatternError,
    RecipeError,
    SparsityError,
    drop_experts,
    expert_saliency,
    prune_experts,
)
from hf_sparse.formats.structure import Cut
from hf_sparse.modeling.architectures import known_experts
from hf_sparse.pruning.compaction import apply_edits, edits_of
from tests.helpers import decoders
from tests.modeling.architectures.test_decoders import CLOSE, generate, logits


class Forbidding:
    """A hook on a router that makes some experts impossible to choose, as transformers computes the rest."""

    def __init__(self, kept: Sequence[int], renormalized: bool) -> None:
        self.kept, self.renormalized = list(kept), renormalized

    def __call__(self, router: Any, inputs: tuple[Tensor], output: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores = F.linear(inputs[0].reshape(-1, router.hidden_dim), router.weight)
        forbidden = [index for index in range(scores.shape[1]) if index not in self.kept]
        scores[:, forbidden] = -torch.inf
        weights, index = scores.float().softmax(-1).topk(router.top_k, dim=-1)
        if self.renormalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return scores, weights, index


def masked(family: str, kept: dict[str, list[int]], **options: Any) -> Any:
    """Return a model whose routers choose among the experts that stay."""
    model = decoders.build(family, **options)
    for block in known_experts(model):
        normalized = bool(getattr(block.router, "norm_topk_prob", True))
        block.router.register_forward_hook(Forbidding(kept.get(block.name, list(range(block.groups))), normalized))
    return model


def names_of(family: str) -> list[str]:
    return [block.name for block in known_experts(decoders.build(family))]


def test_saliency_is_the_mean_of_router_weight_times_norm_by_hand() -> None:
    model = decoders.build("mixtral")
    seen: dict[str, Tensor] = {}
    block = known_experts(model)[1]
    block.module.register_forward_pre_hook(lambda module, inputs: seen.update(hidden=inputs[0]))
    batch = decoders.batch()
    found = expert_saliency(model, [batch])[block.name]
    hidden = seen["hidden"][batch["attention_mask"].bool()]
    weights = (hidden @ block.router.weight.T).softmax(-1)
    expected = []
    for expert in range(4):
        gate, up = (hidden @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        norms = ((F.silu(gate) * up) @ block.experts.down_proj[expert].T).norm(dim=-1)
        values = []
        for token, row in enumerate(weights):
            top = row.topk(2)
            if expert in top.indices.tolist():
                share = row[expert] / top.values.sum()
                values.append(float(share.detach() * norms[token].detach()))
        expected.append(sum(values) / max(1, len(values)))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_saliency_leaves_the_model_as_it_was() -> None:
    model = decoders.build("mixtral").train()
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    expert_saliency(model, [decoders.batch()])
    assert model.training
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", decoders.MOE)
def test_even_drop_is_plain_config(family: str, implementation: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"experts_implementation": implementation}
    names = names_of(family)
    kept = {name: [0, 2, 3] if index else [1, 2, 3] for index, name in enumerate(names)}
    reference, model = masked(family, kept, **options), decoders.build(family, **options)
    edits = drop_experts(model, kept)
    assert {name: cut.kept for name, cut in edits.experts.items()} == {name: tuple(k) for name, k in kept.items()}
    assert not edits_of(model)
    key = "num_local_experts" if family == "mixtral" else "num_experts"
    assert getattr(model.config, key) == 3
    assert model.num_experts == 3
    torch.testing.assert_close(logits(model), logits(reference), **CLOSE)
    assert generate(model) == generate(reference)
    assert model(**decoders.batch(), output_router_logits=True).aux_loss.isfinite()
    model.save_pretrained(tmp_path)
    assert "hf_sparse" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert getattr(plain, "hf_quantizer", None) is None
    torch.testing.assert_close(logits(plain), logits(reference), **CLOSE)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_uneven_drop_is_saved_and_loaded_after_two_rounds(family: str, tmp_path: Path) -> None:
    first, second = names_of(family)
    reference = masked(family, {first: [0, 1, 3], second: [2, 3]}, num_experts_per_tok=1)
    model = decoders.build(family, num_experts_per_tok=1)
    drop_experts(model, {first: [0, 1, 3], second: [0, 2, 3]})
    edits = drop_experts(model, {second: [1, 2]})
    # The first round was even, so the second one counts from its config.
    assert {name: (cut.before, cut.kept) for name, cut in edits.experts.items()} == {second: (3, (1, 2))}
    assert edits_of(model) == edits
    torch.testing.assert_close(logits(model), logits(reference), **CLOSE)
    for how in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        assert generate(model, **how) == generate(reference, **how)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert edits_of(loaded) == edits
    stored = model.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)
    drop_experts(loaded, {first: [0, 2]})  # now they are even again
    assert not edits_of(loaded)


def test_prune_experts_removes_the_least_of_each_mixture() -> None:
    model = decoders.build("qwen3-moe")
    scores = expert_saliency(model, [decoders.batch()])
    edits = prune_experts(model, [decoders.batch()], sparsity=0.5)
    expected = {name: tuple(sorted(values.topk(2).indices.tolist())) for name, values in scores.items()}
    assert {name: cut.kept for name, cut in edits.experts.items()} == expected


def test_global_selection_leaves_each_mixture_what_a_token_needs() -> None:
    model = decoders.build("mixtral")
    with torch.no_grad():  # nothing of the second mixture matters
        known_experts(model)[1].experts.down_proj.mul_(1e-3)
    edits = prune_experts(copy.deepcopy(model), [decoders.batch()], sparsity=0.25, selection="global")
    assert {name: cut.count for name, cut in edits.experts.items()} == {"model.layers.1.mlp": 2}
    with pytest.raises(RecipeError, match="fewer experts than the tokens of the model need"):
        prune_experts(model, [decoders.batch()], sparsity=0.75, selection="global")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            {"model.layers.9.mlp": [0, 1]},
            r"no experts in 'model\.layers\.9\.mlp'; it has them in model\.layers\.0\.mlp",
        ),
        ({"model.layers.0.mlp": [0, 4]}, r"has experts 0 to 3, got \[0, 4\]"),
        ({"model.layers.0.mlp": [1, 1]}, r"has experts 0 to 3, got \[1, 1\]"),
        ({"model.layers.0.mlp": [1]}, "gives each token to 2 experts, so at least as many have to stay, got 1"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_changes_nothing(kept: dict[str, list[int]], message: str) -> None:
    model = decoders.build("mixtral")
    before = logits(model)
    with pytest.raises(RecipeError, match=message):
        drop_experts(model, kept)
    assert torch.equal(logits(model), before)


def test_model_without_experts_or_data_is_an_error() -> None:
    with pytest.raises(PatternError, match=r"where the experts of a model are.*LlamaForCausalLM.*MoE"):
        expert_saliency(decoders.build("llama"), [decoders.batch()])
    with pytest.raises(SparsityError, match="there was no batch"):
        expert_saliency(decoders.build("mixtral"), [])


def test_edits_with_fewer_experts_than_a_token_needs_are_refused() -> None:
    edits = Edits(experts={"model.layers.0.mlp": Cut.of(4, (1,))})
    with pytest.raises(CheckpointError, match=r"1 experts of 'model\.layers\.0\.mlp' are left, and each token needs 2"):
        apply_edits(decoders.build("mixtral"), edits)
    with pytest.raises(CheckpointError, match="which had 8, but with this config"):
        apply_edits(decoders.build("mixtral"), Edits(experts={"model.layers.0.mlp": Cut.of(8, (1, 2))}))
