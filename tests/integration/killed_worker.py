"""A training that others kill: started by test_killed as a program of its own.

    python -m tests.integration.killed_worker OUTPUT SCORER MOMENT [sharded]

MOMENT is "never", "step-N" (the first process dies after step N), "optimizer-N" (dies when the model of checkpoint N is
written and its optimizer is not), "weights-N" (dies between writing the weights of checkpoint N and putting them in
place), "shards-N" or "optimizer_shards-N" (dies when the shards of the model, or of the optimizer, of checkpoint N are
written, and not yet what is in them). Resumes what it finds. With "sharded": under FSDP2 with SHARDED_STATE_DICT.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import Trainer, TrainerCallback

from hf_sparse import SparsityConfig, last_checkpoint
from hf_sparse.hf.quantization import saving as packing
from hf_sparse.pruning.shards import whole
from tests.helpers.ranks import leave
from tests.helpers.training import sparse_trainer
from tests.integration.test_fsdp_trainer import shard_on_a_cpu
from tests.integration.test_sharded_trainer import SHARDED

STEPS = 40
SHARDED_PARTS = ("shards", "optimizer_shards")
"""Moments in the order in which the parts of a checkpoint with shards are written."""
SCHEDULE = {"name": "cubic", "begin": 0.1, "end": 0.8, "every": 3}


def die() -> None:
    """End at once: no cleaning up, no flushing."""
    os.kill(os.getpid(), signal.SIGKILL)


class Progress(TrainerCallback):
    """Tell the parent which step was done, slowly enough for it to choose one, or die after that of a moment."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            print(state.global_step, flush=True)  # noqa: T201  the parent reads it
            if self.moment == f"step-{state.global_step}":
                die()


def arm(moment: str, trainer: Any) -> None:
    """Make the process die at a moment of saving."""
    kind, _, step = moment.partition("-")
    original = Trainer._save_optimizer_and_scheduler
    module: Any = packing
    settle = module.settle_header

    def save(self: Trainer, output_dir: str) -> None:
        if output_dir.endswith(f"checkpoint-{step}"):
            die()
        original(self, output_dir)

    def half(path: Any) -> None:
        if trainer.state.global_step == int(step):
            die()
        settle(path)

    def shards(self: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == int(step):
            calls.append(step)
            if len(calls) == SHARDED_PARTS.index(kind) + 1:
                die()
        finish(self, *args, **kwargs)

    calls: list[str] = []
    writer: Any = FileSystemWriter
    finish = writer.finish
    if kind == "optimizer":
        Trainer._save_optimizer_and_scheduler = save  # type: ignore[method-assign]
    elif kind == "weights":
        module.settle_header = half
    elif kind in SHARDED_PARTS:
        writer.finish = shards


def main(output: Path, scorer: str, moment: str, sharded: str = "") -> None:
    """Train to the end, unless killed, and save what came out."""
    config = SparsityConfig(sparsity=0.9, scorer=scorer, schedule=SCHEDULE)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options: dict[str, Any] = {"ddp_backend": "gloo"} if processes > 1 else {}
    if sharded:
        shard_on_a_cpu()
        options |= {"fsdp": True, "fsdp_config": dict(SHARDED)}
    trainer = sparse_trainer(
        output, config, callbacks=[Progress(moment)], save_strategy="steps", save_steps=5, max_steps=STEPS, **options
    )
    arm(moment, trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(output, processes))
    state = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    if trainer.is_world_process_zero():
        torch.save(state, output / "final.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
