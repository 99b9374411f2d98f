"""A masked module looks like a plain one in a state dict, and takes its own keys, plain weights and packed ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import CheckpointError, Pruner, RecipeError, SparsityConfig, sparsify, summarize
from hf_sparse.formats.codecs import encode
from hf_sparse.formats.codecs.base import pack_bits
from hf_sparse.pruning.mask_state_dict import attach_mask
from hf_sparse.pruning.masked_weight import MaskedWeight, apply_mask, hidden, masked_weight
from hf_sparse.pruning.patterns import Element


def pruned(seed: int = 0, scorer: str = "movement") -> tuple[Any, Pruner]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 8))
    config = SparsityConfig(targets="*", sparsity=0.75, scorer=scorer, schedule="constant")
    pruner = Pruner(model, config).attach()
    score = pruner.units[0].masked.scores
    if score is not None:
        nn.init.normal_(score)
    pruner.step(1.0)
    return model, pruner


def test_state_dict_has_plain_keys_and_a_masked_weight() -> None:
    model, _ = pruned()
    state = model.state_dict()
    assert set(state) == {"0.weight", "0.weight_kept", "0.weight_hidden", "0.weight_scores", "0.bias"}
    assert torch.equal(state["0.weight"], model[0].weight)
    assert int((state["0.weight"] != 0).sum()) == 32


def test_state_dict_round_trips_through_load() -> None:
    (first, _), (second, _) = pruned(0), pruned(1)
    assert second.load_state_dict(first.state_dict()) == ([], [])
    assert torch.equal(hidden(first[0]), hidden(second[0]))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_packed_state_loads_as_it_was() -> None:
    (first, _), (second, _) = pruned(0), pruned(1)
    state = first.state_dict()
    kept = state["0.weight_kept"]
    _, parts = encode(state["0.weight"], "bitmask")
    packed = {
        "0.weight": parts[""], "0.weight_mask": parts["_mask"], "0.weight_hidden": state["0.weight_hidden"][~kept],
        "0.weight_kept": torch.from_numpy(pack_bits(kept.view(-1).numpy())),
        "0.weight_scores": state["0.weight_scores"], "0.bias": state["0.bias"],
    }  # fmt: skip
    assert second.load_state_dict(packed) == ([], [])
    assert torch.equal(hidden(first[0]), hidden(second[0]))
    assert torch.equal(first[0].weight, second[0].weight)


def test_plain_dense_weight_goes_under_the_mask() -> None:
    model, _ = pruned()
    mask = masked_weight(model[0]).mask.clone()  # type: ignore[union-attr]
    model.load_state_dict({"0.weight": torch.ones(8, 16), "0.bias": torch.zeros(8)})
    assert torch.equal(hidden(model[0]), torch.ones(8, 16))
    assert torch.equal(model[0].weight, mask.float())


@pytest.mark.parametrize("scorer", ["movement", "soft_movement", "gradient"])
def test_plain_dense_weight_leaves_what_was_learned(scorer: str) -> None:
    model, pruner = pruned(scorer=scorer)
    for parameter in model.parameters():
        parameter.grad = None
    model(torch.ones(2, 16)).sum().backward()
    pruner.observe()
    learned = ("_kept", "_scores", "_importance", "_strength", "_level")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.endswith(learned)}
    model.load_state_dict({"0.weight": torch.ones(8, 16), "0.bias": torch.zeros(8)})
    after = model.state_dict()
    assert torch.equal(after["0.weight_hidden"], torch.ones(8, 16))
    assert len(before) >= 2
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_state_of_another_method_is_an_error_and_not_a_fresh_start() -> None:
    (model, _), (other, _) = pruned(scorer="movement"), pruned(scorer="magnitude")
    with pytest.raises(RuntimeError, match=r"Missing key.*scores"):
        model.load_state_dict(other.state_dict())


def test_layer_that_is_the_whole_model_has_plain_keys_too() -> None:
    layer = nn.Linear(4, 4)
    masked = MaskedWeight(layer.weight, Element())
    attach_mask(layer, masked, "weight")
    masked.mask[0] = False
    assert set(layer.state_dict()) == {"weight", "bias", "weight_kept", "weight_hidden"}
    other = nn.Linear(4, 4)
    other.load_state_dict(layer.state_dict(), strict=False)  # anyone who knows no masks gets the sparse weight
    assert torch.equal(other.weight, layer.weight)
    assert not other.weight[0].any()


def test_state_dict_is_not_changed_by_loading_it() -> None:
    (first, _), (second, _) = pruned(0), pruned(1)
    state = first.state_dict()
    keys = list(state)
    second.load_state_dict(state)
    assert list(state) == keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": torch.ones(5)}, r"has shape \(5,\) and no bitmask that fits \(8, 16\)"),
        ({"0.weight_hidden": torch.ones(7)}, r"holds \(7,\) values, but 96 are removed"),
        ({"0.weight_kept": torch.ones(3, dtype=torch.uint8)}, r"does not fit the weight of shape \(8, 16\)"),
        ({"0.weight_kept": torch.ones(16)}, r"does not fit the weight of shape \(8, 16\)"),
        ({"0.weight": torch.ones(5), "0.weight_mask": torch.ones(16)}, r"no bitmask that fits \(8, 16\)"),
        ({"0.weight": torch.ones(5), "0.weight_mask": torch.ones(16).byte()}, "as many ones as there are values"),
        ({"0.weight": torch.ones(5), "0.weight_mask": torch.ones(17).byte()}, r"no bitmask that fits \(8, 16\)"),
    ],
)
def test_state_that_does_not_fit_is_an_error(change: dict[str, torch.Tensor], message: str) -> None:
    model, _ = pruned()
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict({**model.state_dict(), **change})


@pytest.mark.parametrize("value", [torch.ones(5), torch.tensor(float("nan")), torch.tensor(float("inf"))])
@pytest.mark.parametrize("suffix", ["strength", "level"])
def test_state_that_no_training_can_go_on_from_is_an_error(suffix: str, value: torch.Tensor) -> None:
    model, _ = pruned(scorer="soft_movement")
    with pytest.raises(CheckpointError, match=rf"'0\.weight_{suffix}' must be a finite number"):
        model.load_state_dict({**model.state_dict(), f"0.weight_{suffix}": value})


def test_packed_state_with_bits_behind_the_end_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    Pruner(model, SparsityConfig(targets="*", sparsity=0.5)).attach()
    fits = torch.tensor([0b00000011, 0b1], dtype=torch.uint8)
    model.load_state_dict({"0.weight": torch.tensor([1.0, 2.0, 3.0]), "0.weight_mask": fits})
    assert hidden(model[0]).tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]
    behind = torch.tensor([0b00000011, 0b10], dtype=torch.uint8)
    for key in ("0.weight_mask", "0.weight_kept"):
        with pytest.raises(CheckpointError, match="bits behind the end"):
            model.load_state_dict({"0.weight": torch.ones(3), "0.weight_mask": fits, key: behind})


def test_mask_used_twice_in_a_forward_pass_learns_from_both() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data.copy_(torch.eye(2))
    for scorer in ("movement", "gradient"):
        model = nn.Sequential(copy.deepcopy(layer))
        pruner = Pruner(model, SparsityConfig(targets="*", sparsity=0.5, scorer=scorer)).attach()
        model(model(torch.tensor([1.0, 2.0]))).sum().backward()
        # y = W W x: dL/dW' = 1 (Wx)^T + (W^T 1) x^T = 2 * ((1, 2), (1, 2)) for W = 1.
        masked = pruner.units[0].masked
        if masked.scores is not None:
            assert masked.scores.grad is not None
            assert masked.scores.grad.tolist() == [[2.0, 0.0], [0.0, 4.0]]
        else:
            pruner.observe()
            assert masked.get_buffer("importance").tolist() == [[2.0, 4.0], [2.0, 4.0]]


def test_evaluation_gathers_no_gradients() -> None:
    model, pruner = pruned(scorer="gradient")
    with torch.no_grad():
        model(torch.ones(2, 16))
    assert pruner.units[0].masked.gathered is None


def test_copies_are_independent() -> None:
    model, _ = pruned()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        hidden(twin[0]).zero_()
        masked_weight(twin[0]).mask.fill_(True)  # type: ignore[union-attr]
    assert int((model[0].weight != 0).sum()) == 32


def test_second_mask_is_an_error_and_the_model_is_untouched() -> None:
    model, _ = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match=r"'0\.weight' already has a mask"):
        Pruner(model, SparsityConfig(targets="*", sparsity=0.5)).attach()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bake_makes_a_plain_layer_with_the_same_parameter() -> None:
    model, pruner = pruned()
    parameter, expected = hidden(model[0]), model[0].weight.detach().clone()
    pruner.bake()
    assert type(model[0]) is nn.Linear
    assert model[0].weight is parameter
    assert torch.equal(model[0].weight, expected)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_bfloat16_weights_and_gradient_checkpointing() -> None:
    model, pruner = pruned()
    model.to(torch.bfloat16)
    x = torch.ones(2, 16, dtype=torch.bfloat16, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    scores = pruner.units[0].masked.scores
    assert scores is not None
    assert scores.grad is not None
    assert model[0].weight.dtype == torch.bfloat16


def test_summary_says_what_is_there() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    sparsify(model, SparsityConfig(targets="0", sparsity=0.75))
    summary = summarize(model)
    assert (summary.sparsity, summary.parameters, summary.nonzeros) == (0.75, 128, 32)
    assert summary.dense_bytes == 512
    assert summary.bytes == 128 // 8 + 32 * 4
    assert summary.model_parameters == 128 + 8 + 16 + 2
    assert "0.weight" in str(summary)
    assert "75.00%" in str(summary)
    assert summary.to_dict()["weights"][0]["shape"] == [8, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_masked_weight_and_its_gradient_are_exact_whatever_the_values(dtype: torch.dtype) -> None:
    special = torch.tensor([[1.5, -1.5, 0.0, -0.0, float("inf"), -float("inf"), float("nan"), 6e-8]] * 2, dtype=dtype)
    mask = torch.tensor([[True] * 8, [False] * 8])
    for values in (special, special.t().contiguous().t()):  # also where rows do not follow each other in memory
        weight = nn.Parameter(values)
        masked = apply_mask(weight, mask)
        masked.backward(values)
        assert weight.grad is not None
        for found in (masked.detach(), weight.grad):
            assert found.dtype == dtype
            assert torch.equal(found[0].contiguous().view(torch.uint8), values[0].contiguous().view(torch.uint8))
            assert not found[1].contiguous().view(torch.uint8).any()  # +0, also of infinities and NaN
