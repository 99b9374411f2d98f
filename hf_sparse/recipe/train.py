"""The training run of a recipe: first refuse what cannot work, then data, model, Trainer, files, report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..errors import CheckpointError, RecipeError
from ..formats.inspection import inspect
from ..hf.hub.model_card import forget
from ..hf.hub.push import guard_trainer
from ..hf.trainer.callback import SparsityCallback
from ..hf.trainer.checkpoint import check_unused, last_checkpoint, remove_trained, trained_files
from ..hf.trainer.distillation_callback import DistillationCallback
from ..hf.trainer.resume import guard_checkpoints
from ..hf.trainer.run_record import check_resume, listing, names, read_record
from ..pruning.fill import fill
from ..pruning.keep_zeros import keep_zeros
from ..pruning.summary import summarize
from ..utils.atomic_io import read_json, write_text
from ..utils.validation import is_integer
from ..vocabulary import Criteria, VocabularyReport, carry_report, trim_vocabulary
from .identity import SECTION, RunRecord, run_facts
from .lora import add_lora, check_run, merge_lora
from .recipe import Recipe
from .report import RunResult, report_text
from .step_timer import StepTimer
from .task import Examples, Setup

logger = logging.getLogger(__name__)

LONGER = ("max_steps", "num_train_epochs")
"""What may be changed of a run that has done its last step: then there are more."""


@contextlib.contextmanager
def one_progress_bar() -> Iterator[None]:
    """Leave out the bars of transformers for files, which would run inside that of the training."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


@one_progress_bar()
def run(recipe: Recipe, resume: bool = False, overwrite: bool = False, allow: Sequence[str] = ()) -> RunResult:
    """Train the model of a recipe, measure it on the validation data, and write everything into its output folder.

    The folder gets the model and tokenizer, `recipe.yaml` as resolved, `trainer_state.json`, `train_results.json`,
    `eval_results.json`, `all_results.json`, `report.md` and the model card `README.md`.

    Args:
        resume: continue from the last complete checkpoint in the output folder, if there is one. It must have been made
            by the same recipe, data and model.
        overwrite: replace the model and the checkpoints of another run in the output folder. Without it, and without
            `resume`, a folder that has any is refused.
        allow: keys of the recipe that may differ from the checkpoint that is resumed from, such as "learning_rate".

    Raises:
        RecipeError: before any training, for whatever does not fit together.
        CheckpointError: before any training, if the checkpoint to resume from was made by another run.
    """
    check_flags(resume, overwrite, allow)
    arguments = recipe.training_arguments()
    output = Path(arguments.output_dir or ".")
    if not resume and not overwrite:
        check_unused(output)
    check_run(recipe)
    task = recipe.model.kind
    examples = task.load_examples(recipe)
    set_seed(recipe.seed)  # before the model exists: every method starts from the same task head
    model, tokenizer = task.load_model(recipe, examples)
    facts = run_facts(recipe, examples, model, tokenizer, arguments.world_size)
    trimmed = None if recipe.vocabulary is None else trim(recipe.vocabulary, model, tokenizer, examples)
    if recipe.model.fill:
        fill(model)
    if recipe.model.keep_zeros:
        keep_zeros(model)
    freeze(model, recipe.freeze)
    if recipe.model.lora is not None:
        add_lora(model, recipe.model.lora)

    checkpoint, changes = _checkpoint(arguments, facts, resume, allow)
    timer, record = StepTimer(), RunRecord(facts, changes)
    # The record last: it reads the optimizer of the others.
    callbacks = [timer, *_method(recipe, changes), record]
    trainer = task.trainer(Setup(recipe, arguments, model, tokenizer, examples, callbacks))
    guard_trainer(trainer)  # also where nothing is pruned
    guard_checkpoints(trainer)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        if overwrite:
            remove_trained(output)
        recipe.save(output / "recipe.yaml")
        forget(output)  # or an interrupted run would look finished, with the results of the one before
    PartialState().wait_for_everyone()
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    if recipe.model.lora is not None:
        merge_lora(model, output if trainer.is_world_process_zero() else None)
    trainer.save_model(str(output), _internal_call=True)  # pushed at the end, with what was measured
    trainer.save_state()
    trainer.save_metrics("train", trained.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    result = RunResult(output, metrics, summarize(model), timer.median)
    if trainer.is_world_process_zero():
        if trimmed is not None:
            trimmed.save(output)
        else:
            carry_report(recipe.model.name, output)
        report = report_text(recipe, examples, result, inspect(output), record.history)
        write_text(output / "report.md", report)  # its presence marks the run as finished
        try:
            task.write_card(output)
        except RecipeError as error:
            logger.warning("the model card was not written: %s", error)
    if arguments.push_to_hub:
        trainer.push_to_hub()
    return result


def trim(
    criteria: Criteria, model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Examples
) -> VocabularyReport:
    """Remove the tokens that the training examples do not need; validation examples are measured.

    Raises:
        RecipeError: as `hf_sparse.trim_vocabulary`.
    """
    train, validation = (
        [value for row in split for value in row.values() if isinstance(value, str)]
        for split in (examples.train, examples.validation)
    )
    report = trim_vocabulary(model, tokenizer, train, held_out=validation, **criteria.to_dict())
    logger.info("vocabulary: %s of %s tokens kept", f"{report.tokens_after:,}", f"{report.tokens:,}")
    return report


def check_flags(resume: bool, overwrite: bool, allow: Sequence[str]) -> None:
    """Raise `RecipeError` for options of a run that contradict each other."""
    if resume and overwrite:
        raise RecipeError("resume and overwrite contradict each other: one continues a run, the other replaces it")
    if allow and not resume:
        raise RecipeError("allow is for a run that is resumed: it names what may differ from the checkpoint")


def _checkpoint(
    arguments: TrainingArguments, facts: Mapping[str, Any], resume: bool, allow: Sequence[str]
) -> tuple[str | None, dict[str, str]]:
    """Return the checkpoint to start from, and what was allowed to differ from the run that made it."""
    output = Path(arguments.output_dir or ".")
    checkpoint = arguments.resume_from_checkpoint
    if resume:
        checkpoint = last_checkpoint(output, arguments.world_size)
        if checkpoint is None:
            logger.warning("--resume: %s has no checkpoint yet, training starts from the beginning", output)
        else:
            logger.info("resuming from %s", checkpoint)
        if checkpoint is None and (left := trained_files(output)):
            raise CheckpointError(
                f"{output} has a model ({left[0].name}) and no checkpoint, so there is nothing to resume from. Replace "
                "it (--overwrite), or choose another output folder"
            )
    if checkpoint is None:
        return None, {}
    recorded = (read_record(checkpoint, SECTION) or {}).get("facts")
    if not isinstance(recorded, Mapping):
        raise CheckpointError(
            f"checkpoint {checkpoint} does not record what made it: it was not written by `hf-sparse train`, or by an "
            "older hf_sparse. Start a new run"
        )
    changes = check_resume(checkpoint, recorded, facts, allow, "--resume --allow {}")
    if changes and _is_finished(checkpoint) and not any(names(key, name) for key in changes for name in LONGER):
        raise CheckpointError(
            f"the run of {checkpoint} has done its last step, so a change would have no effect: {listing(changes)}. "
            "Train with it into another folder, or from the beginning (--overwrite)"
        )
    return checkpoint, changes


def _is_finished(checkpoint: str) -> bool:
    """Return whether the run that wrote a checkpoint had no step left."""
    state = read_json(Path(checkpoint) / "trainer_state.json") or {}
    done, steps = state.get("global_step"), state.get("max_steps")
    return is_integer(done) and is_integer(steps) and 0 < steps <= done


def _method(recipe: Recipe, changes: Mapping[str, str]) -> list[TrainerCallback]:
    """Return the callback that prunes or distils, if any."""
    if recipe.sparsity is not None:
        # The data of a recipe are in its own record, whole.
        allow = ["data", *(key for key in changes if key.startswith("sparsity."))]
        return [SparsityCallback(recipe.sparsity, distillation=recipe.distillation, allow=allow)]
    return [] if recipe.distillation is None else [DistillationCallback(recipe.distillation)]


def freeze(model: nn.Module, globs: Sequence[str]) -> None:
    """Keep the parameters whose names match any of the shell globs from being trained.

    Raises:
        RecipeError: for a glob that matches no parameter, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for glob in globs:
        matched = [name for name in parameters if fnmatchcase(name, glob)]
        if not matched:
            some = ", ".join(list(parameters)[:8])
            raise RecipeError(f"freeze: '{glob}' matches no parameter. Parameters of the model: {some}, ...")
        for name in matched:
            parameters[name].requires_grad_(False)
    if globs and not any(parameter.requires_grad for parameter in parameters.values()):
        raise RecipeError(
            f"`freeze` must leave parameters to train, but {', '.join(map(repr, globs))} match all of them"
        )
