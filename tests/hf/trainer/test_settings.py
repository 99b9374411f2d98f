"""Pruning under the settings that Trainers are given: checkpointing, accumulation, autocast, torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_sparse import SparsityConfig, summarize
from hf_sparse.pruning.masked_weight import masked_weight
from tests.helpers.training import RAMP, bert, sparse_trainer

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": "magnitude"},
    "movement": {"scorer": "movement"},
    "soft_movement": {"scorer": "soft_movement"},
    "blocks": {"scorer": "movement", "pattern": {"name": "block", "rows": 8, "cols": 8}},
    "neurons": {"scorer": "movement", "pattern": "neuron"},
    "taylor": {"scorer": "taylor"},
    "rigl": {"scorer": {"name": "rigl", "every": 2}},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Take(TrainerCallback):
    """Note masks and scores after every step."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = [layer for module in model.modules() if (layer := masked_weight(module)) is not None]
        self.masks += [layer.mask.clone() for layer in layers]
        self.scores = [layer.scores.detach().clone() for layer in layers if layer.scores is not None]


def trained(folder: Path, method: str, rate: float = 0.01, **options: Any) -> tuple[Any, Take]:
    take = Take()
    asked = dict(METHODS[method])
    if asked["scorer"] == "movement":
        asked["scorer"] = {"name": "movement", "learning_rate": rate}
    config = SparsityConfig(**{"sparsity": 0.75, "schedule": {**RAMP, "every": 2}, **asked})
    defaults: dict[str, Any] = {"max_steps": 6, "train_sampling_strategy": "sequential"}
    trainer = sparse_trainer(folder, config, bert(**NO_DROPOUT), [take], **{**defaults, **options})
    trainer.train()
    assert summarize(trainer.model).sparsity == pytest.approx(0.75, abs=1e-2)
    return trainer.model, take


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_activations_change_no_bit(method: str, tmp_path: Path) -> None:
    reentrant = method in ("blocks", "taylor")
    plain, expected = trained(tmp_path / "plain", method)
    options: dict[str, Any] = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    model, found = trained(tmp_path / "checkpointed", method, **options)
    assert all(torch.equal(a, b) for a, b in zip(found.masks, expected.masks, strict=True))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_steps_are_those_of_eager_mode(method: str, tmp_path: Path) -> None:
    # Plain gradient descent: sums of floats in another order differ in the last digits, which Adam makes large.
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1}
    plain, expected = trained(tmp_path / "plain", method, **options)
    model, found = trained(
        tmp_path / "compiled", method, torch_compile=True, torch_compile_backend="aot_eager", **options
    )
    assert all(torch.equal(a, b) for a, b in zip(found.masks, expected.masks, strict=True))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["magnitude", "movement", "blocks", "neurons", "taylor"])
def test_accumulated_batches_are_one_large_batch(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0}
    plain, expected = trained(tmp_path / "plain", method, rate=0.4, learning_rate=0.1, **options)
    # The Trainer of transformers 5.23 sums the losses of accumulated batches for models that, as BERT does, take the
    # number of items in the batch and ignore it. So the rates are a fourth.
    split, found = trained(
        tmp_path / "split", method, rate=0.1, learning_rate=0.025, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, **options,
    )  # fmt: skip
    assert not all(bool(mask.all()) for mask in found.masks)
    assert all(torch.equal(a, b) for a, b in zip(found.masks, expected.masks, strict=True))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_reaches_the_same_sparsity_with_masks_and_scores_of_full_precision(
    method: str, tmp_path: Path
) -> None:
    model, found = trained(tmp_path, method, bf16=True)
    assert all(tensor.dtype == torch.float32 for tensor in [*found.scores, *model.parameters()])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in [*found.scores, *model.parameters()])
