"""The Trainer under FSDP2 with SHARDED_STATE_DICT, the default of accelerate: saved, evaluated, resumed by others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_sparse import CheckpointError, last_checkpoint, summarize
from hf_sparse.pruning.shards import whole
from tests.helpers.ranks import on_ranks
from tests.integration.test_fsdp_trainer import LAYERS, trainer_of

SHARDED = {**LAYERS, "state_dict_type": "SHARDED_STATE_DICT"}
GLOBAL_BATCH = 8


def run(folder: Path, method: str, resume: str | None = None, **options: Any) -> Any:
    """Train, or go on from a checkpoint, and save the model."""
    defaults: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 8, "optim": "adamw_torch", "learning_rate": 1e-3,
        "per_device_train_batch_size": GLOBAL_BATCH // int(os.environ["WORLD_SIZE"]),
        "fsdp_config": dict(SHARDED),
    }  # fmt: skip
    trainer = trainer_of(folder, method, True, **{**defaults, **options})
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "out"))
    return trainer


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def saved(folder: Path) -> None:
    """On each rank: what a sharded run leaves behind, and that it goes on from its middle as if it had not ended."""
    trainer = run(folder / "whole", "movement")
    checkpoint = folder / "whole" / "checkpoint-8"
    assert {path.name for path in (checkpoint / "pytorch_model_fsdp_0").iterdir()} >= {".metadata", "__1_0.distcp"}
    assert not list(checkpoint.glob("*.safetensors"))
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    found = AutoModelForSequenceClassification.from_pretrained(folder / "whole" / "out")
    expected = whole_state(trainer.model)
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert summarize(found).sparsity == summarize(trainer.model).sparsity > 0.85
    if trainer.is_world_process_zero():
        found.save_pretrained(folder / "alone")
        names = [path.name for path in sorted((folder / "alone").iterdir())]
        assert "model.safetensors" in names
        for name in names:  # those of one process, to the last byte
            assert (folder / "alone" / name).read_bytes() == (folder / "whole" / "out" / name).read_bytes(), name
        shutil.copytree(checkpoint, folder / "again" / "checkpoint-8")
    dist.barrier()
    assert last_checkpoint(folder / "again", dist.get_world_size()) == str(folder / "again" / "checkpoint-8")
    run(folder / "again", "movement", last_checkpoint(folder / "again"))
    dist.barrier()
    whole_run, resumed = (folder / name / "out" / "model.safetensors" for name in ("whole", "again"))
    assert whole_run.read_bytes() == resumed.read_bytes()
    with pytest.raises(CheckpointError, match="written with fsdp_config state_dict_type=SHARDED_STATE_DICT"):
        run(folder / "full", "movement", str(checkpoint), fsdp_config=dict(LAYERS))


def test_sharded_run_saves_and_resumes(tmp_path: Path) -> None:
    on_ranks(__name__, "saved", tmp_path)


def efficient(folder: Path) -> None:
    """On each rank: weights that process 0 alone has at first, and sends to the others, masks and scores with them."""
    for method in ("magnitude", "soft", "taylor"):
        outputs = []
        for kind, settings in (("plain", {}), ("efficient", {"cpu_ram_efficient_loading": True})):
            place = folder / method / kind
            run(place, method, save_strategy="no", max_steps=8, fsdp_config={**SHARDED, **settings})
            dist.barrier()
            outputs.append((place / "out" / "model.safetensors").read_bytes())
        assert outputs[0] == outputs[1], method


@pytest.mark.slow
def test_efficient_loading(tmp_path: Path) -> None:
    on_ranks(__name__, "efficient", tmp_path)


# See `trainer_of`; and the Trainer multiplies a loss by the number of processes for models that take a number of items,
# which the mean of a sequence classification does not: with its default, one process learns at half the rate of two.
PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "average_tokens_across_devices": False}
RESUMED = ("movement", "soft", "neurons", "taylor")


def whole_run(folder: Path) -> None:
    """On each rank: whole runs, which leave checkpoints in the middle."""
    for method in RESUMED:
        run(folder / method / "whole", method, **PLAIN)


def resumed(folder: Path) -> None:
    """On each rank: go on from the checkpoints of another number of processes."""
    for method in RESUMED:
        place = folder / method / os.environ["WORLD_SIZE"]
        if os.environ["RANK"] == "0":
            shutil.copytree(folder / method / "whole" / "checkpoint-8", place / "checkpoint-8")
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        dist.barrier()
        assert last_checkpoint(place, int(os.environ["WORLD_SIZE"])) == str(place / "checkpoint-8")
        run(place, method, last_checkpoint(place, int(os.environ["WORLD_SIZE"])), **PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "count"), [(2, 1), (2, 4), (4, 2), (4, 1)])
def test_resumed_by_another_number_of_processes(tmp_path: Path, saved_by: int, count: int) -> None:
    on_ranks(__name__, "whole_run", tmp_path, saved_by)
    on_ranks(__name__, "resumed", tmp_path, count)
    for method in RESUMED:
        expected, found = (
            AutoModelForSequenceClassification.from_pretrained(tmp_path / method / name / "out")
            for name in ("whole", str(count))
        )
        assert summarize(found).sparsity == summarize(expected).sparsity > 0.25
        for (name, one), other in zip(expected.named_parameters(), found.parameters(), strict=True):
            assert torch.equal(one != 0, other != 0), f"{method}: {name}"
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


class States(TrainerCallback):
    """Keep the whole state at each step whose checkpoint is written, and call a step in the middle the best one."""

    def __init__(self, best: int) -> None:
        self.best = best
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.states[state.global_step] = {name: tensor.clone() for name, tensor in whole_state(model).items()}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_distance"] = abs(state.global_step - self.best)


def best(folder: Path) -> None:
    """On each rank: a run ends with the best of its checkpoints at the final sparsity, whichever the first was."""
    for number in (16, 20):
        states = States(number)
        trainer = run(
            folder / str(number), "movement", save_steps=4, eval_strategy="steps", eval_steps=4, callbacks=[states],
            load_best_model_at_end=True, metric_for_best_model="eval_distance", greater_is_better=False,
        )  # fmt: skip
        assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{number}"
        assert sorted(states.states) == [4, 8, 12, 16, 20]
        found = whole_state(trainer.model)
        for name, tensor in found.items():
            assert torch.equal(tensor, states.states[number][name]), name
        dense = next(name for name in found if name.endswith("0.output.dense.weight"))
        assert not torch.equal(states.states[16][dense], states.states[20][dense])


@pytest.mark.slow
def test_best_model_at_the_end(tmp_path: Path) -> None:
    on_ranks(__name__, "best", tmp_path)
