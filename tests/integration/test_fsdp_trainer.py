"""The Trainer under FSDP2 on two processes: the masks and weights of DDP, saved, evaluated and resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_sparse import SparsityCallback, SparsityConfig, last_checkpoint, summarize
from hf_sparse.pruning.masked_weight import MaskedWeight, hidden
from tests.helpers.ranks import on_ranks
from tests.helpers.training import RAMP, Rows, arguments, bert

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": "magnitude"},
    "movement": {"scorer": {"name": "movement", "learning_rate": 1.0, "warmup": 0.2}},
    "soft": {"scorer": {"name": "soft_movement", "learning_rate": 1.0}},
    "taylor": {"scorer": {"name": "taylor", "momentum": 0.9}},
    "rigl": {"scorer": {"name": "rigl", "every": 2}},
    "neurons": {"scorer": {"name": "movement", "learning_rate": 1.0}, "pattern": "neuron", "sparsity": 0.5},
}
LAYERS = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def config(name: str) -> SparsityConfig:
    return SparsityConfig(**{"sparsity": 0.9, "schedule": {**RAMP, "every": 3}, **METHODS[name]})


class Sharded(TrainerCallback):
    """See that weights and scores are sharded while they train, and masks whole."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layer = model.bert.encoder.layer[0].output.dense
        mask = layer.parametrizations.weight[0]
        assert isinstance(mask, MaskedWeight)
        for parameter in (hidden(layer), mask.scores):
            assert parameter is None or isinstance(parameter, DTensor)
            assert parameter is None or parameter.to_local().numel() == parameter.numel() // args.world_size
        assert mask.mask.shape == layer.weight.shape


def shard_on_a_cpu() -> None:
    """Make accelerate take the FSDP path on a CPU, which it has for accelerators alone: there it goes on with DDP."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def trainer_of(folder: Path, name: str, fsdp: bool, callbacks: Sequence[Any] = (), **options: Any) -> Any:
    # Plain gradient descent: sums of floats in another order differ in the last digits, which Adam, dividing small
    # gradients by their own size, makes large.
    how: dict[str, Any] = {"fsdp": True, "fsdp_config": dict(LAYERS)} if fsdp else {}
    if fsdp:
        shard_on_a_cpu()
    defaults = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    return Trainer(
        bert(**NO_DROPOUT),
        arguments(folder, **{**defaults, "ddp_backend": "gloo", **how, **options}),
        train_dataset=Rows(),
        eval_dataset=Rows(16),
        callbacks=[SparsityCallback(config(name)), *([Sharded()] if fsdp else []), *callbacks],
    )


def against_ddp(folder: Path) -> None:
    """What each rank runs: every method under DDP and under FSDP2, and what comes out of both."""
    for fsdp in (False, True):
        for name in METHODS:
            kind = "fsdp" if fsdp else "ddp"
            trainer = trainer_of(folder / name / kind, name, fsdp)
            trainer.train()
            evaluated = trainer.evaluate()
            trainer.save_model(str(folder / name / kind / "out"))
            found = {"sparsity": summarize(trainer.model).sparsity, "eval_loss": evaluated["eval_loss"]}
            (folder / f"{name}-{kind}-{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_fsdp_trains_and_saves_what_ddp_does(tmp_path: Path) -> None:
    on_ranks(__name__, "against_ddp", tmp_path)
    for name in METHODS:
        ddp, fsdp = (tmp_path / name / kind / "out" for kind in ("ddp", "fsdp"))
        for rank in (0, 1):
            one, other = (json.loads((tmp_path / f"{name}-{kind}-{rank}.json").read_text()) for kind in ("ddp", "fsdp"))
            assert other["sparsity"] == one["sparsity"] > 0.45, name
            assert other["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5), name
        expected = AutoModelForSequenceClassification.from_pretrained(ddp).state_dict()
        found = AutoModelForSequenceClassification.from_pretrained(fsdp)
        assert (fsdp / "model.safetensors").stat().st_size == (ddp / "model.safetensors").stat().st_size
        for key, tensor in expected.items():
            if "layer." in key and tensor.ndim == 2:
                assert torch.equal(found.state_dict()[key] != 0, tensor != 0), f"{name}: masks of {key}"
            torch.testing.assert_close(found.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)


def resumed(folder: Path) -> None:
    """What each rank runs: a whole run, one resumed from its middle, one that ends with its best model."""
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8, "optim": "adamw_torch", "learning_rate": 1e-3}
    for name in ("movement", "soft", "taylor"):
        whole = trainer_of(folder / name / "whole", name, True, **saves)
        whole.train()
        whole.save_model(str(folder / name / "whole" / "out"))
        middle = folder / name / "again" / "checkpoint-8"
        if whole.is_world_process_zero():
            assert not list((folder / name / "whole" / "checkpoint-8").glob("pytorch_model_fsdp*"))
            shutil.copytree(folder / name / "whole" / "checkpoint-8", middle)
        whole.accelerator.wait_for_everyone()
        assert last_checkpoint(middle.parent, 2) == str(middle)
        again = trainer_of(middle.parent, name, True, **saves)
        again.train(resume_from_checkpoint=last_checkpoint(middle.parent, 2))
        again.save_model(str(middle.parent / "out"))
    best = trainer_of(
        folder / "best", "movement", True, **{**saves, "save_steps": 5}, eval_strategy="steps", eval_steps=5,
        load_best_model_at_end=True,
    )  # fmt: skip
    best.train()
    assert best.state.best_global_step >= 15  # the ramp ends at 12
    assert best.evaluate()["eval_loss"] == pytest.approx(best.state.best_metric, rel=1e-5)


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_run(tmp_path: Path) -> None:
    on_ranks(__name__, "resumed", tmp_path)
    for name in ("movement", "soft", "taylor"):
        whole, again = ((tmp_path / name / kind / "out" / "model.safetensors") for kind in ("whole", "again"))
        assert whole.read_bytes() == again.read_bytes()
