"""The sparsity config and the training data in a training checkpoint: what a resume compares.

Also how far the schedule was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.utils import logging

from ...errors import CheckpointError
from .data_record import data_facts
from .run_record import check_resume, flatten, read_record, recorded_in, write_record

logger = logging.get_logger(__name__)

SECTION = "sparsity"


def check_sparsity_record(trainer: Trainer, folder: Path, config: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Compare the config and the data of a checkpoint with those of a callback and its Trainer.

    Args:
        config: as `resolved` returns it.
        allow: keys that may differ.

    Raises:
        CheckpointError: for any other difference, or if the checkpoint has no sparsity config.
    """
    if trainer.model_init is not None:
        raise CheckpointError(
            f"cannot resume from {folder} with model_init: it makes a new model, without masks, before the checkpoint "
            "is loaded. Give the Trainer the model itself (model=...)"
        )
    recorded = read_record(folder, SECTION)
    if recorded is None:
        if "sparsity" in allow:
            return
        raise CheckpointError(
            f"checkpoint {folder} does not record a sparsity config: it was written without SparsityCallback, or by an "
            "older hf_sparse. To prune the model that it holds, load it with from_pretrained and train without "
            "resume_from_checkpoint; to resume all the same: SparsityCallback(..., allow=['sparsity'])"
        )
    data = data_facts(trainer.train_dataset)
    old = {"sparsity": recorded.get("config"), "data": recorded.get("data", data)}  # of an older hf_sparse
    new = {"sparsity": config, "data": data}
    check_resume(folder, flatten(old), flatten(new), allow, "SparsityCallback(..., allow=['{}'])")


def record_sparsity(
    state: TrainerState, config: Mapping[str, Any], data: Mapping[str, Any], processes: int = 1
) -> float:
    """Record a config in the state of a Trainer, and return the progress that a resumed run starts from.

    A run that is resumed with more steps is less far along its schedule than its masks are. The schedule then holds
    where it was, so that no zero is lost.

    Args:
        data: facts of the training data.
        processes: that train together.
    """
    recorded = recorded_in(state, SECTION)
    steps, before = recorded.get("max_steps"), 0.0
    if state.global_step and isinstance(steps, int) and steps > 0:
        before = max(min(state.global_step / steps, 1.0), float(recorded.get("progress") or 0.0))
        now = state.global_step / state.max_steps
        if before > now:
            logger.warning(
                f"resumed at step {state.global_step} of {state.max_steps}, from a run of {steps} steps: the schedule "
                f"would go back from {before:.0%} to {now:.0%} of the training and prune less. Masks stay at "
                f"{before:.0%} until the longer run gets there, so the sparsity does not fall"
            )
    others = recorded.get("processes", processes)
    if state.global_step and others != processes:
        logger.warning(
            f"the checkpoint of step {state.global_step} was written by {others} processes, and there are {processes} "
            "now. Masks, scores and optimizer state go on; the random numbers of dropout do not, and the batches are "
            "the same only if the number of examples in each step, over all processes, is"
        )
    facts = {"config": config, "data": dict(data), "max_steps": state.max_steps, "progress": before}
    write_record(state, SECTION, {**facts, "processes": processes})
    return before
