"""Resuming in the Trainer: callbacks compare a checkpoint with their run before it is loaded.

Callbacks of transformers get no event before `resume_from_checkpoint` is loaded, and what does not fit then ends in a
size mismatch of torch, or silently continues another run. So `Trainer.train` is wrapped, once, when hf_sparse is
imported. Without `resume_from_checkpoint` the wrapper changes nothing.
"""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ...errors import CheckpointError
from .checkpoint import is_checkpoint
from .run_record import STATE, read_record
from .wrapped import load_training_state, save_training_state


@runtime_checkable
class ChecksResume(Protocol):
    """A callback that compares a checkpoint with its own run."""

    def before_resume(self, trainer: Trainer, folder: Path) -> None:
        """Called before anything of the checkpoint is loaded; raises `CheckpointError` if it is of another run."""


def announce_resume() -> None:
    """Wrap `Trainer.train` so that callbacks are notified before a checkpoint is loaded; a second call does nothing."""
    original = Trainer.train
    if getattr(original, "announces_resume", False):
        return

    @functools.wraps(original)
    def train(self: Trainer, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir or ".")
        if folder and (Path(folder) / STATE).is_file():  # all else is for the Trainer to refuse
            _check(self, Path(folder))
        return original(self, resume_from_checkpoint, *args, **kwargs)

    train.announces_resume = True  # type: ignore[attr-defined]
    Trainer.train = train  # type: ignore[method-assign]


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

    @functools.wraps(save)
    def save_model(output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
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
    trainer.save_model = save_model
    if load is not None:
        trainer._load_from_checkpoint = load_from_checkpoint


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
            trainer.get_batch_samples = lambda *_, **__: ([], None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a later call of `train` have its batches."""
        vars(self._trainer()).pop("get_batch_samples", None)
