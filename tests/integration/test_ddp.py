"""Two processes under torchrun hold the same masks at every step, and train as one would."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_sparse import SparsityCallback, SparsityConfig, SparsityError, summarize
from hf_sparse.pruning.masked_weight import MaskedWeight
from tests.helpers.ranks import on_ranks
from tests.helpers.training import RAMP, Rows, arguments, bert, sparse_trainer

METHODS: dict[str, dict[str, Any]] = {
    "movement": {"scorer": "movement"},
    "bfloat16": {"scorer": {"name": "movement", "dtype": "bfloat16"}},
    "soft": {"scorer": "soft_movement"},
    "taylor": {"scorer": "taylor"},
    "magnitude": {"scorer": "magnitude"},
    "neurons": {"scorer": "movement", "pattern": "neuron"},
    "neurons-taylor": {"scorer": "taylor", "pattern": "neuron"},
}


BATCH = 16


class Watch(TrainerCallback):
    """Note a hash of all masks after every step."""

    def __init__(self) -> None:
        self.hashes: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        masks = [module.mask for module in model.modules() if hasattr(module, "mask") and hasattr(module, "scores")]
        self.hashes.append(hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks)).hexdigest())


def worker(folder: Path) -> None:
    """What each rank runs: train with every method, and write down the hashes."""
    found = {}
    for name, method in METHODS.items():
        watch = Watch()
        config = SparsityConfig(sparsity=0.9, schedule=RAMP, **method)
        trainer = sparse_trainer(folder / name, config, callbacks=[watch], ddp_backend="gloo")
        trainer.train()
        found[name] = {"hashes": watch.hashes, "sparsity": summarize(trainer.model).sparsity}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def half_batches(folder: Path) -> None:
    """What each rank runs: movement with half of `BATCH` on each, in the order of the data."""
    # Left on, the Trainer of transformers 5.23 doubles the loss on two ranks for models such as BERT, which take the
    # number of items in the batch and ignore it.
    model = movement_run(folder / "half", BATCH // 2, ddp_backend="gloo", average_tokens_across_devices=False)
    if os.environ["RANK"] == "0":
        torch.save(model.state_dict(), folder / "half.pt")


def movement_run(folder: Path, batch: int, **options: Any) -> Any:
    # Plain gradient descent: sums of floats in another order differ in the last digits, which Adam, dividing small
    # gradients by their own size, makes large.
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    scorer = {"name": "movement", "learning_rate": 1.0}
    trainer = sparse_trainer(
        folder, SparsityConfig(sparsity=0.9, scorer=scorer, schedule=RAMP), model, optim="sgd", learning_rate=0.1,
        per_device_train_batch_size=batch, train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer.train()
    return trainer.model


def strayed(folder: Path) -> None:
    """What each rank runs: a training in which one rank's scores are changed behind its back."""

    class Stray(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 9 and os.environ["RANK"] == "1":
                for module in model.modules():
                    if isinstance(module, MaskedWeight) and module.scores is not None:
                        with torch.no_grad():
                            module.scores.neg_()

    callback = SparsityCallback(SparsityConfig(sparsity=0.9, scorer="movement", schedule=RAMP), check_masks_every=5)
    args = arguments(folder / "stray", ddp_backend="gloo")
    trainer = Trainer(bert(), args, train_dataset=Rows(), callbacks=[callback, Stray()])
    try:
        trainer.train()
    except SparsityError as error:
        found = {"error": str(error), "step": trainer.state.global_step}
        (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_both_ranks_make_the_same_masks_at_every_step(tmp_path: Path) -> None:
    on_ranks(__name__, "worker", tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for name in METHODS:
        assert len(first[name]["hashes"]) == 20
        assert first[name]["hashes"] == second[name]["hashes"], name
        assert len(set(first[name]["hashes"])) > 3  # the masks do change on the way
        # A layer of 64 neurons keeps 6 of them.
        assert first[name]["sparsity"] == pytest.approx(1 - 6 / 64 if "neurons" in name else 0.9, abs=1e-3)


@pytest.mark.slow
def test_two_ranks_with_half_the_batch_are_one_with_the_whole(tmp_path: Path) -> None:
    on_ranks(__name__, "half_batches", tmp_path)
    halves = torch.load(tmp_path / "half.pt", weights_only=True)
    whole = movement_run(tmp_path / "whole", BATCH).state_dict()
    assert whole.keys() == halves.keys()
    for name, expected in whole.items():
        if name.endswith("weight") and "layer." in name and expected.ndim == 2:
            assert torch.equal(expected != 0, halves[name] != 0), f"masks of {name}"
        torch.testing.assert_close(halves[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_ranks_whose_masks_differ_stop_with_an_error_on_both(tmp_path: Path) -> None:
    on_ranks(__name__, "strayed", tmp_path)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert "at step 10 the masks of process 1 differ from those of process 0" in found["error"]
        assert found["step"] == 10
