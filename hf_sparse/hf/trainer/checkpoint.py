"""Training checkpoints in an output folder: which one to resume from, and what a new run must not inherit."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...errors import CheckpointError, RecipeError
from .run_record import STATE, read_record

SHARDS, OPTIMIZER_SHARDS = "pytorch_model_fsdp_0", "optimizer_0"
"""Folders of a checkpoint that torch.distributed.checkpoint writes for accelerate; `.metadata` in them comes last."""

_FOLDER = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = re.compile(r"(adapter_)?model.*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder has the name of a training checkpoint."""
    return _FOLDER.fullmatch(Path(folder).name) is not None


def trained_files(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints and the model weights that a run has left in its output folder."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    entries = sorted(folder.iterdir())
    checkpoints = [path for path in entries if path.is_dir() and is_checkpoint(path)]
    return checkpoints + [path for path in entries if path.is_file() and _WEIGHTS.fullmatch(path.name)]


def check_unused(output_dir: str | os.PathLike[str]) -> None:
    """Raise `RecipeError` if a new run in this folder would inherit checkpoints, or overwrite a model."""
    if found := trained_files(output_dir):
        listed = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
        raise RecipeError(
            f"output folder {os.fspath(output_dir)} has a model or checkpoints of another run ({listed}). Resume that "
            "run (--resume), replace it (--overwrite), or choose another output folder"
        )


def remove_trained(output_dir: str | os.PathLike[str]) -> None:
    """Remove the checkpoints and the model weights of an earlier run from an output folder."""
    for path in trained_files(output_dir):
        if path.is_dir():
            (path / STATE).unlink(missing_ok=True)  # first: half a folder is then no complete checkpoint
            shutil.rmtree(path)
        else:
            path.unlink()


def last_checkpoint(output_dir: str | os.PathLike[str], processes: int = 1) -> str | None:
    """Return the folder of the last complete training checkpoint, for `resume_from_checkpoint`.

    A run that is killed while it saves leaves half a checkpoint, and `resume_from_checkpoint=True` would take it. Here
    a checkpoint counts only if it has everything that the Trainer writes, down to its state, which comes last.

    Args:
        output_dir: of the `TrainingArguments`.
        processes: that train together; each has a random state of its own in the checkpoint. What SparsityCallback
            has recorded comes first: the checkpoint of another number of processes can be complete too.

    Returns:
        The path, or None where there is no checkpoint at all.

    Raises:
        CheckpointError: if there are checkpoints, but none is complete: starting anew in silence would lose a run.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(last_checkpoint(folder))
        None
    """
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if is_checkpoint(path)] if folder.is_dir() else []
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    missing: dict[str, str] = {}
    for path in found:
        missing[path.name] = _missing(path, processes)
        if not missing[path.name]:
            return str(path)
    if missing:
        listed = ", ".join(f"{name} lacks {what}" for name, what in missing.items())
        raise CheckpointError(
            f"{folder} has no complete checkpoint to resume from: {listed}. Was the run killed while it saved, or was "
            "save_only_model set? Remove these folders to start anew"
        )
    return None


def _missing(path: Path, processes: int) -> str:
    """Return the first thing that a checkpoint lacks, or nothing."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = None
    processes = _written_by(path, processes)
    random = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    # The second and third under FSDP, with whole and with sharded state; the last by DeepSpeed, after all else of it.
    optimizers = ("optimizer.pt", "optimizer.bin", f"{OPTIMIZER_SHARDS}/.metadata", "latest")
    if not any((path / name).is_file() for name in optimizers):
        return "optimizer.pt"
    for name in ("scheduler.pt", *random):
        if not (path / name).is_file():
            return name
    if not any(path.glob("*.safetensors")) and not (path / SHARDS / ".metadata").is_file():
        return "its weights"
    if state is None:
        return f"a readable {STATE}"
    step = int(path.name.rpartition("-")[2])
    return "" if isinstance(state, dict) and state.get("global_step") == step else f"a {STATE} of its step"


def _written_by(path: Path, processes: int) -> int:
    """Return how many processes wrote a checkpoint, which can be resumed by another number of them."""
    try:
        recorded = (read_record(path, "sparsity") or {}).get("processes")
    except CheckpointError:
        return processes
    return recorded if type(recorded) is int and 0 < recorded < 1 << 20 else processes


def note_best_checkpoint(args: TrainingArguments, state: TrainerState) -> None:
    """Set which checkpoint of a run is the best one, from the step of its evaluation.

    The Trainer asks whether the folder exists before any process has written its shards there, so that with
    `SHARDED_STATE_DICT` the processes name different checkpoints, all of them older ones. Call it when the checkpoint
    of this step has been written, and when a run resumes from one.
    """
    step, known = state.best_global_step, state.best_model_checkpoint
    if not (args.load_best_model_at_end and step):
        return
    run = Path(known).parent if known else Path(str(args.output_dir))
    if (folder := run / f"{PREFIX_CHECKPOINT_DIR}-{step}").is_dir():
        state.best_model_checkpoint = str(folder)
