"""The loss without a layer or a head is that of a model pruned there, and nothing stays changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_sparse import RecipeError, SparsityConfig, sparsify
from hf_sparse.analysis.ablation import head_losses, layer_losses, mean_loss


def test_sensitivity_restores_weights_to_the_bit_also_after_an_error(dense: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    model.train()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, :2] = torch.tensor([-0.0, 0.0])
    before = {
        name: tensor.clone().view(torch.int32)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    layers = {"out": model.bert.encoder.layer[0].output.dense}
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    loss, losses = layer_losses(model, layers, [batch], [0.5, 0.9])
    assert model.training
    assert len(losses["out"]) == 2
    assert losses["out"][0] != loss
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("in the middle")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        layer_losses(model, layers, [batch], [0.5, 0.9])
    after = model.state_dict()
    assert all(torch.equal(bits, after[name].view(torch.int32)) for name, bits in before.items())
    with pytest.raises(RecipeError, match="ascending"):
        layer_losses(model, layers, [batch], [0.9, 0.5])


def test_sensitivity_loss_is_that_of_a_model_pruned_there(dense: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    name = "bert.encoder.layer.1.intermediate.dense"
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    _, losses = layer_losses(model, {name: model.get_submodule(name)}, [batch], [0.7])
    sparsify(model, SparsityConfig(targets=name, sparsity=0.7))
    assert losses[name][0] == pytest.approx(float(model(**batch).loss.detach()), abs=1e-7)


def test_loss_without_a_head_is_that_of_a_model_in_which_it_is_pruned(dense: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    name = "bert.encoder.layer.1.attention"
    alone, (none, half, most) = head_losses(model, [batch], [0.1, 0.5, 0.9])[name]
    assert none == mean_loss(model, [batch])
    order = sorted(range(4), key=alone.__getitem__)
    for heads, loss in [*(([head], alone[head]) for head in range(4)), (order[:2], half), (order[:3], most)]:
        other = AutoModelForSequenceClassification.from_pretrained(dense)
        with torch.no_grad():
            for head in heads:
                other.bert.encoder.layer[1].attention.output.dense.weight[:, 8 * head : 8 * head + 8] = 0.0
        assert loss == pytest.approx(mean_loss(other, [batch]), abs=1e-6)
    assert not model.bert.encoder.layer[1].attention.output.dense._forward_pre_hooks
