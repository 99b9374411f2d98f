"""What makes a run: its recipe, data and model, recorded in each checkpoint and compared before a resume.

Paths are not part of it. Data, model, tokenizer and teacher count by their content, so a run can be resumed after its
folders were moved, and not after a file of the same name has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..hf.trainer.run_record import flatten, names, recorded_in, write_record
from ..hf.trainer.teacher_cache import tokenizer_fingerprint, weights_fingerprint
from .recipe import Recipe
from .task import Examples

SECTION = "run"
"""Section of the run record in a checkpoint."""
OF_THE_MODEL = ("model", "tokenizer", "processes")
"""What `run_facts` knows only once the model is loaded."""
WITHOUT_EFFECT = (
    "output_dir", "run_name", "report_to", "project", "trackio", "logging_", "log_", "disable_tqdm", "save_",
    "push_to_hub", "hub_", "resume_from_checkpoint", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "skip_memory_metrics",
)  # fmt: skip
"""Beginnings of training arguments that change no weight."""


def run_facts(
    recipe: Recipe,
    examples: Examples,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    processes: int,
) -> dict[str, Any]:
    """Return what makes a run, flat and in plain JSON types.

    Args:
        examples: of the data section.
        model: as it was loaded, before it is changed.
        processes: that train together.
    """
    return {
        **recipe_facts(recipe, examples),
        "model": f"{type(model).__name__}, weights {weights_fingerprint(model)}",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "processes": processes,
    }


def recipe_facts(recipe: Recipe, examples: Examples) -> dict[str, Any]:
    """Return what a recipe and its data add to `run_facts`."""
    sections = recipe.to_dict()
    training = {k: v for k, v in sections["training"].items() if not k.startswith(WITHOUT_EFFECT)}
    facts = {
        "task": recipe.model.task,
        "fill": recipe.model.fill,
        "keep_zeros": recipe.model.keep_zeros or None,
        "metric": sections["metric"],
        "vocabulary": sections["vocabulary"],
        "freeze": sections["freeze"],
        "sparsity": sections["sparsity"],
        "distillation": _distillation(sections["distillation"]),
        "training": training,
        "seed": recipe.seed,
        "data": {
            "train": _content(examples.train),
            "validation": _content(examples.validation),
            "classes": list(examples.names),
            "max_length": recipe.data.max_length,
            "max_target_length": recipe.data.max_target_length,
        },
    }
    return {key: value for key, value in flatten(facts).items() if value is not None}


def _content(dataset: Dataset) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return f"{len(dataset)} examples, content {digest.hexdigest()}"


def _distillation(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if section is None:
        return None
    facts = {key: value for key, value in section.items() if key != "cache"}
    folder = Path(section["teacher"])
    if section["teacher"] != "self" and folder.is_dir():
        facts["teacher"] = f"weights {_files(sorted(folder.glob('*.safetensors')))}"
    return facts


def _files(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class RunRecord(TrainerCallback):
    """Record what makes a run in its checkpoints; after a resume with changes that were allowed, put them into effect.

    Args:
        facts: see `run_facts`.
        changes: what differs from the checkpoint that is resumed from, as "old -> new" by key.
    """

    def __init__(self, facts: Mapping[str, Any], changes: Mapping[str, str]) -> None:
        self.facts, self.changes = facts, changes
        self.history: list[str] = []
        self._rates: list[float] = []
        self._options: list[dict[str, Any]] = []

    def before_optimizer(self, trainer: Trainer) -> None:
        """Do nothing: see `hf.trainer.optimizer.TakesPart`."""

    def after_optimizer(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Remember the options of this run, which a resume replaces by those of the checkpoint."""
        groups = optimizer.param_groups
        self._rates = [float(group["lr"]) for group in groups]
        left_out = ("params", "lr", "initial_lr")
        self._options = [{k: v for k, v in group.items() if k not in left_out} for group in groups]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record."""
        earlier = recorded_in(state, SECTION).get("changes")
        self.history = [str(line) for line in earlier] if isinstance(earlier, list) else []
        self.history += [f"step {state.global_step}: {key}: {text}" for key, text in self.changes.items()]
        write_record(state, SECTION, {"facts": dict(self.facts), "changes": self.history})
        if any(names(key, "training") or names(key, "learning_rate") for key in self.changes):
            self._restore_options(kwargs["optimizer"], kwargs["lr_scheduler"])

    def _restore_options(self, optimizer: Any, scheduler: Any) -> None:
        before = list(getattr(scheduler, "base_lrs", ()))
        for index, (group, options) in enumerate(zip(optimizer.param_groups, self._options, strict=True)):
            group.update(options)
            if index < len(before) and before[index]:
                group["lr"] *= self._rates[index] / before[index]  # as far along its schedule as it was
                group["initial_lr"] = scheduler.base_lrs[index] = self._rates[index]
        if before:
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the Trainer logs
