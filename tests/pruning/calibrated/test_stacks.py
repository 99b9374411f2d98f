"""Stacked experts in one shot: each is calibrated with its own tokens, as the papers' formulas say, in float64."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from hf_sparse import PatternError, RecipeError, SparsityConfig, SparsityError, sparsify
from hf_sparse.modeling.layer_kinds import Slot, kind_of
from hf_sparse.modeling.layer_matching import match_weights
from hf_sparse.pruning.calibrated import stacks
from hf_sparse.pruning.calibrated.outliers import outlier_shares
from hf_sparse.pruning.calibrated.walk import Walk
from tests.helpers import mixtures, oneshot

TARGETS = ["*.experts"]
METHODS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "wanda": ({"scorer": "wanda", "sparsity": 0.5}, partial(oneshot.wanda, sparsity=0.5)),
    "wanda 2:4": ({"scorer": "wanda", "pattern": "2:4"}, partial(oneshot.wanda, sparsity=0.5, nm=(2, 4))),
    "wanda block": (
        {"scorer": "wanda", "sparsity": 0.5, "pattern": {"name": "block", "rows": 4, "cols": 2}},
        partial(mixtures.block_scores, rows=4, columns=2, sparsity=0.5),
    ),
    "sparsegpt": ({"scorer": "sparsegpt", "sparsity": 0.5}, partial(oneshot.sparsegpt, sparsity=0.5)),
    "sparsegpt 2:4": ({"scorer": "sparsegpt", "pattern": "2:4"}, partial(oneshot.sparsegpt, sparsity=0.5, nm=(2, 4))),
}


def check(found: Any, expected: Any) -> None:
    for key, weight in expected.state_dict().items():
        own = found.state_dict()[key].double()
        assert torch.equal(own != 0, weight != 0), key
        torch.testing.assert_close(own, weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", [*mixtures.KINDS, "qwen2-moe"])
def test_each_expert_is_pruned_with_its_own_tokens(kind: str, method: str, caplog: pytest.LogCaptureFixture) -> None:
    group, formula = METHODS[method]
    model = mixtures.build(kind, unreached=True)
    expected = copy.deepcopy(model).double()
    expected.config._experts_implementation = "eager"  # the others have no float64
    assert mixtures.prune_by_hand(expected, mixtures.batches(), formula) == 1
    with caplog.at_level(logging.WARNING):
        sparsify(model, SparsityConfig(targets=TARGETS, **group), mixtures.batches())
    check(model, expected)  # everything else, the router with it, is as it was
    (message,) = [record.message for record in caplog.records if "no token" in record.message]
    assert message.startswith("1 of 10 experts (10.0%) were given no token of the calibration batches")
    (name,) = [name for name, module in model.named_modules() if module is mixtures.mixture(model, 1).experts]
    assert f"expert 4 of '{name}'" in message


@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_reconstruction_of_each_expert_fits_its_own_outputs(kind: str) -> None:
    dense = mixtures.build(kind)
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    group: dict[str, Any] = {"scorer": "magnitude", "sparsity": 0.5, "targets": TARGETS}
    errors = {}
    steps = {"name": "cg", "steps": 200, "damping": 0.0}
    config = SparsityConfig(**group, reconstruction=steps)
    sparsify(model, config, mixtures.batches(), on_layer=lambda update: errors.update({update.name: update.error}))
    sparsify(plain, SparsityConfig(**group))
    inputs = mixtures.routed(dense, 0, mixtures.batches())
    old, new, zeros = (mixtures.matrices(mixtures.mixture(each, 0).experts) for each in (dense, model, plain))
    for name, stack in new.items():
        assert torch.equal(stack != 0, zeros[name] != 0), name
        lost = given = 0.0
        for expert, weight in enumerate(stack.double()):
            x, target = inputs[expert][name].double(), old[name][expert].double()
            for row, kept in enumerate(zeros[name][expert] != 0):
                best = torch.linalg.lstsq(x[:, kept], x @ target[row]).solution
                difference = x[:, kept] @ (best - weight[row][kept])
                assert float(difference.norm()) < 1e-3 * float((x @ target[row]).norm())
            lost += float((x @ (weight - target).T).square().sum())
            given += float((x @ target.T).square().sum())
        (error,) = [errors[key] for key in errors if ".layers.0." in key and key.endswith(f".experts.{name}")]
        assert error == pytest.approx(lost / given, rel=1e-2)


@pytest.mark.parametrize("scorer", ["wanda", "sparsegpt"])
def test_as_many_experts_as_fit_are_observed_at_a_time_to_the_same_bits(
    scorer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SparsityConfig(scorer=scorer, sparsity=0.5, targets=["*_proj", *TARGETS], selection="owl")
    at_once, one_by_one = mixtures.build("gpt-oss", unreached=True), mixtures.build("gpt-oss", unreached=True)
    sparsify(at_once, config, mixtures.batches())
    monkeypatch.setattr(stacks, "HELD_BYTES", 1)
    sparsify(one_by_one, config, mixtures.batches())
    for key, weight in at_once.state_dict().items():
        assert torch.equal(one_by_one.state_dict()[key], weight), key


def test_passes_hold_no_more_than_the_limit() -> None:
    experts = mixtures.mixture(mixtures.build("mixtral"), 0).experts
    weights = {name: Slot(experts, name) for name in ("gate_up_proj", "down_proj")}
    each = 4 * (16**2 + 12**2)
    parts = stacks.passes_over(weights, weights, limit=2 * each)
    assert [found["down_proj"] for found in parts] == [range(2), range(2, 4), range(4, 5)]
    assert stacks.passes_over(weights, (), limit=1) == [{name: range(5) for name in weights}]


def test_outliers_are_those_of_all_experts_of_a_block_that_have_tokens() -> None:
    model = mixtures.build("gpt-oss", unreached=True)
    weights = match_weights(model, TARGETS)
    walk = Walk(model, mixtures.batches(), weights)
    with torch.no_grad():
        found = outlier_shares(walk, weights, outlier=2.0)
    for block in range(2):
        inputs, importance = mixtures.routed(model, block, mixtures.batches()), []
        for name, stack in mixtures.matrices(mixtures.mixture(model, block).experts).items():
            reached = [
                (weight, inputs[expert][name]) for expert, weight in enumerate(stack) if len(inputs[expert][name])
            ]
            importance += [(weight.abs() * x.norm(dim=0)).flatten() for weight, x in reached]
        every = torch.cat(importance)
        share = float((every > 2 * every.mean()).float().mean())
        assert found[f"model.layers.{block}.mlp.experts.down_proj"] == pytest.approx(share, abs=1e-6)
        assert found[f"model.layers.{block}.mlp.experts.gate_up_proj"] == pytest.approx(share, abs=1e-6)


def test_experts_without_any_token_are_an_error() -> None:
    group = SparsityConfig(scorer="wanda", sparsity=0.5, targets=TARGETS)
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(SparsityError, match=r"every token that 'model.layers.0.mlp.experts' was given is padding"):
        sparsify(mixtures.build("mixtral"), group, [{"input_ids": ids, "attention_mask": 0 * ids}])


def test_a_block_of_weights_must_not_lie_in_two_experts() -> None:
    pattern = {"name": "block", "rows": 32, "cols": 4}  # 5 experts of 16 rows
    group: dict[str, Any] = {"sparsity": 0.5, "targets": ["*.experts.down_proj"], "pattern": pattern}
    model = mixtures.build("mixtral")
    model.model.layers = model.model.layers[:1]
    with pytest.raises(PatternError, match="down_proj"):
        sparsify(model, SparsityConfig(scorer="wanda", **group), mixtures.batches())


def test_experts_that_do_not_say_how_they_compute_are_refused() -> None:
    model = mixtures.build("mixtral")
    for block in model.model.layers:
        del block.mlp.experts.has_gate
    with pytest.raises(RecipeError, match=r"needs the inputs of '.*gate_up_proj'.*does not state how each of them"):
        sparsify(model, SparsityConfig(scorer="wanda", sparsity=0.5, targets=TARGETS), mixtures.batches())


def test_padding_of_experts_that_all_tokens_share_does_not_count() -> None:
    """They are called with all tokens in one dimension."""
    group = SparsityConfig(scorer="wanda", sparsity=0.5, targets=["*.shared_expert.*"])
    padded, plain = mixtures.build("qwen2-moe"), mixtures.build("qwen2-moe")
    ids = torch.arange(5, 17)[None]
    mask = torch.cat([torch.zeros(1, 30, dtype=torch.long), torch.ones_like(ids)], 1)
    left = torch.cat([torch.full((1, 30), 7), ids], 1)
    sparsify(plain, group, [{"input_ids": ids}])
    sparsify(padded, group, [{"input_ids": left, "attention_mask": mask}])
    for key, weight in plain.state_dict().items():
        assert torch.equal(padded.state_dict()[key], weight), key


@pytest.mark.parametrize(("scorer", "sparsity"), [("wanda", 0.55), ("sparsegpt", 0.57)])
def test_the_same_request_again_changes_no_zero(scorer: str, sparsity: float) -> None:
    """Though each row keeps a whole number of entries, and so fewer than the request says."""
    model = mixtures.build("mixtral")
    config = SparsityConfig(scorer=scorer, sparsity=sparsity, targets=["*_proj", *TARGETS])
    sparsify(model, config, mixtures.batches())
    zeros = {key: weight == 0 for key, weight in model.state_dict().items()}
    sparsify(model, config, mixtures.batches())
    for key, weight in model.state_dict().items():
        assert torch.equal(weight == 0, zeros[key]), key
    with pytest.raises(RecipeError, match="removed weights cannot be restored"):
        sparsify(model, SparsityConfig(scorer=scorer, sparsity=0.3, targets=TARGETS), mixtures.batches())


def test_experts_without_a_gate_have_what_their_activation_makes_of_their_tokens() -> None:
    config = NemotronHConfig(hidden_size=8, n_routed_experts=4, moe_intermediate_size=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts: Any = NemotronHExperts(config)
    for parameter in experts.parameters():
        parameter.data.normal_()
    x, chosen, share = torch.randn(7, 8), torch.stack([torch.randperm(4)[:2] for _ in range(7)]), torch.rand(7, 2)
    kind = kind_of(experts)
    assert kind is not None
    with torch.no_grad():
        computed = torch.zeros(7, 8)
        for name, expert, rows in kind.part_inputs(experts, (x, chosen, share), {}, range(4), lambda hidden: None):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            if name == "up_proj":
                assert torch.equal(rows, x[token])
            else:
                computed[token] += rows @ experts.down_proj[expert].T * share[token, place, None]
        torch.testing.assert_close(computed, experts(x, chosen, share))
