"""Resuming in the Trainer: callbacks compare a checkpoint with their run before it is loaded.

Callbacks of transformers get no event before `resume_from_checkpoint` is loaded, and what does not fit then ends in a
size mismatch of torch, or silently continues another run. So `Trainer.train` is wrapped (see `hf.patches`).
Without `resume_from_checkpoint` the wrapper changes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ...errors import CheckpointError
from .. import patches
from .checkpoint import is_checkpoint
from .fsdp import save_packed_model, writes_no_model
from .run_record import STATE, read_record
from .wrapped import load_training_state, save_training_state


@runtime_checkable
class ChecksResume(Protocol):
    """A callback that compares a checkpoint with its own run."""

    def before_resume(self, trainer: Trainer, folder: Path) -> None:
        """Called before anything of the checkpoint is loaded; raises `CheckpointError` if it is of another run."""


def train(
    original: Callable[..., Any],
    trainer: Trainer,
    resume_from_checkpoint: str | bool | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Wrap `Trainer.train`: callbacks are notified before a checkpoint is loaded.

    Raises:
        CheckpointError: if the checkpoint is of another run.
    """
    folder = resume_from_checkpoint
    if folder is True:
        folder = get_last_checkpoint(trainer.args.output_dir or ".")
    if folder and (Path(folder) / STATE).is_file():  # the Trainer refuses all else
        _check(trainer, Path(folder))
    return original(trainer, resume_from_checkpoint, *args, **kwargs)


patches.wrap(Trainer, "train", train)


def _check(trainer: Trainer, folder: Path) -> None:
    listeners = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ChecksResume)]
    for listener in listeners:
        listener.before_resume(trainer, folder)
    if not listeners and read_record(folder, "sparsity") is not None:
        raise CheckpointError(
            f"checkpoint {folder} was written while SparsityCallback pruned the model, and this Trainer has no "
            "SparsityCallback. To resume, add one with the same config (callbacks=[SparsityCallback(config)]); to "
            "fine-tune what it holds, load the model with from_pretrained and train without resume_from_checkpoint"
        )


def guard_checkpoints(trainer: Any) -> None:
    """Make the checkpoints of a Trainer whole, whatever its model is and whatever was in their folders before.

    A checkpoint is marked incomplete before it is written over, so that no mixture of two counts as complete; and that
    of a wrapper around a `PreTrainedModel` gets the training state too. A run resumed after its last step trains
    no other. A second call does nothing.
    """
    save, load = trainer.save_model, getattr(trainer, "_load_from_checkpoint", None)
    if getattr(save, "guards_checkpoints", False):
        return

    @wraps(save)
    def save_model(output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if writes_no_model(trainer) and not is_checkpoint(folder := output_dir or trainer.args.output_dir):
            save_packed_model(trainer, folder)
            return None
        if output_dir is None or not is_checkpoint(output_dir) or not trainer.is_world_process_zero():
            return save(output_dir, *args, **kwargs)
        (Path(output_dir) / STATE).unlink(missing_ok=True)
        saved = save(output_dir, *args, **kwargs)
        save_training_state(trainer.model, output_dir)
        return saved

    def load_from_checkpoint(folder: str, *args: Any, **kwargs: Any) -> Any:
        assert load is not None
        loaded = load(folder, *args, **kwargs)
        load_training_state(trainer.model, folder)
        return loaded

    trainer.add_callback(_EndAtLastStep(trainer))
    save_model.guards_checkpoints = True  # type: ignore[attr-defined]
    patches.put(trainer, "save_model", save_model)
    if load is not None:
        patches.put(trainer, "_load_from_checkpoint", load_from_checkpoint)


class _EndAtLastStep(TrainerCallback):
    """Give a Trainer no batches that resumes from its last step: it looks at its step count only after training one."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before the first step if the last one is done."""
        trainer: Any = self._trainer()
        if trainer is not None and 0 < state.max_steps <= state.global_step:
            control.should_training_stop = True
            patches.put(trainer, "get_batch_samples", lambda *_, **__: ([], None))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a later call of `train` have its batches."""
        patches.take(self._trainer(), "get_batch_samples")
