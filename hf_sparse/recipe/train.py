"""The training run of a recipe: first refuse what is known to be wrong, then data, model, Trainer, files, report."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import statistics
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    set_seed,
)

from .._version import __version__
from ..errors import RecipeError, SparsityError
from ..formats.inspection import Inspection, inspect
from ..hf.auto import check_length, load_tokenizer
from ..hf.hub.model_card import card_text, facts_of, forget, write_card
from ..hf.hub.push import guard_trainer
from ..hf.trainer.callback import SparsityCallback
from ..hf.trainer.checkpoint import last_checkpoint
from ..hf.trainer.distillation_callback import DistillationCallback
from ..pruning.fill import fill
from ..pruning.summary import Summary, summarize
from ..utils.atomic_io import write_text
from .data import LabelledTexts, load_texts
from .metrics import build_metrics
from .recipe import Recipe
from .sections import ModelSection

logger = logging.getLogger(__name__)

NOT_MEASURED = ("epoch", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
"""What an evaluation returns beside the metrics."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run measured.

    Args:
        output: folder with the model, tokenizer, recipe, metrics and report.
        metrics: of the validation texts, with the Trainer's names (`eval_accuracy`, ...).
        summary: sparsity of the trained model.
        seconds_per_step: median over the optimizer steps, data loading included, evaluation and saving not.

    Units:
        seconds_per_step in seconds.
    """

    output: Path
    metrics: dict[str, float]
    summary: Summary
    seconds_per_step: float


def run(recipe: Recipe, resume: bool = False) -> RunResult:
    """Train the model of a recipe, measure it on the validation texts, and write everything into its output folder.

    Args:
        resume: go on from the last complete checkpoint in the output folder, if there is one.

    The folder gets the model and tokenizer, `recipe.yaml` as resolved, `trainer_state.json`, `train_results.json`,
    `eval_results.json`, `all_results.json`, `report.md` and the model card `README.md`.

    Raises:
        RecipeError: before any training, for whatever does not fit together.
    """
    arguments = recipe.training_arguments()
    tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
    compute_metrics = build_metrics(recipe.metric, recipe.model.predicts, tokenizer)
    texts = load_texts(recipe.data, recipe.model.predicts)
    set_seed(recipe.seed)  # before the model exists: every method starts from the same task head
    model = load_model(recipe.model, texts)
    check_length(recipe.data.max_length, model, tokenizer)
    if recipe.model.fill:
        fill(model)
    freeze(model, recipe.freeze)

    train, validation = texts.tokenized(tokenizer, recipe.data.max_length, recipe.data.max_target_length)
    timer = StepTimer()
    callbacks: list[TrainerCallback] = [timer]
    if recipe.sparsity is not None:
        callbacks.append(SparsityCallback(recipe.sparsity, distillation=recipe.distillation))
    elif recipe.distillation is not None:
        callbacks.append(DistillationCallback(recipe.distillation))
    trainer = (Seq2SeqTrainer if recipe.model.predicts == "text" else Trainer)(
        model=model,
        args=arguments,
        data_collator=collator_for(recipe, tokenizer, model),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )
    guard_trainer(trainer)  # also where nothing is pruned
    output = Path(arguments.output_dir or ".")
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        recipe.save(output / "recipe.yaml")
        forget(output)  # or an interrupted run would look finished, with the results of the one before
    checkpoint = arguments.resume_from_checkpoint
    if resume:
        checkpoint = last_checkpoint(output, arguments.world_size)
        logger.info("resuming from %s", checkpoint or "nothing: there is no checkpoint yet")
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output), _internal_call=True)  # pushed at the end, with what was measured
    trainer.save_state()
    trainer.save_metrics("train", trained.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    result = RunResult(output, metrics, summarize(model), timer.median)
    if trainer.is_world_process_zero():
        report = report_text(recipe, texts, result, inspect(output))
        write_text(output / "report.md", report)  # that it is there tells that the run is finished
        try:
            write_card(output, card_text(facts_of(output)))
        except RecipeError as error:
            logger.warning("the model card was not written: %s", error)
    if arguments.push_to_hub:
        trainer.push_to_hub()
    return result


def collator_for(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """Return what makes padded batches of tokenized texts."""
    if recipe.model.predicts == "text":
        return DataCollatorForSeq2Seq(tokenizer, model)
    return DataCollatorWithPadding(tokenizer)


def load_model(section: ModelSection, texts: LabelledTexts) -> PreTrainedModel:
    """Load a pretrained model that writes texts, or one with a head for the classes of the texts or for one number.

    Raises:
        RecipeError: if it cannot be loaded, or is asked for another number of classes than the texts have.
        CheckpointError: if it is packed, and damaged.
    """
    factory: Any = AutoModelForSequenceClassification
    head: dict[str, Any] = {}
    if section.predicts == "text":
        factory = AutoModelForSeq2SeqLM
    elif section.predicts == "number":
        head = {"num_labels": 1, "problem_type": "regression"}
    else:
        if section.num_labels not in (None, len(texts.names)):
            raise RecipeError(
                f"model.num_labels is {section.num_labels}, but the training texts have {len(texts.names)} classes: "
                f"{', '.join(texts.names)}"
            )
        head = {"id2label": dict(enumerate(texts.names)), "label2id": {name: i for i, name in enumerate(texts.names)}}
    try:
        model: PreTrainedModel = factory.from_pretrained(section.name, revision=section.revision or "main", **head)
    except SparsityError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"cannot load model '{section.name}' (neither a folder, nor to be had from the Hub?): {error}"
        ) from error
    return model


def freeze(model: nn.Module, globs: Sequence[str]) -> None:
    """Keep the parameters whose names match any of the shell globs from being trained.

    Raises:
        RecipeError: for a glob that matches no parameter.
    """
    parameters = dict(model.named_parameters())
    for glob in globs:
        matched = [name for name in parameters if fnmatchcase(name, glob)]
        if not matched:
            some = ", ".join(list(parameters)[:8])
            raise RecipeError(f"freeze: '{glob}' matches no parameter. Parameters of the model: {some}, ...")
        for name in matched:
            parameters[name].requires_grad_(False)


class StepTimer(TrainerCallback):
    """Times optimizer steps from the beginning of one to the beginning of the next.

    Whatever ran between two steps that is no training, such as an evaluation, takes that pair out.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._begun is not None:
            self.seconds.append(now - self._begun)
        self._begun = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = None

    @property
    def median(self) -> float:
        """Return the median seconds per step; NaN before the second step."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


def report_text(recipe: Recipe, texts: LabelledTexts, result: RunResult, files: Inspection) -> str:
    """Return the report of a run as Markdown."""
    measured = {name.removeprefix("eval_"): value for name, value in result.metrics.items() if name not in NOT_MEASURED}
    source = " / ".join(filter(None, (recipe.data.name, recipe.data.config))) or os.path.basename(
        recipe.data.train or ""
    )
    versions = f"hf_sparse {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    weights = None if files.packed else {weight.name for weight in result.summary.weights}
    rows = [
        ("model", os.path.basename(recipe.model.name.rstrip("/\\"))),
        ("data", f"{source}: {len(texts.train)} training texts, {len(texts.validation)} validation texts"),
        *((f"{name} on the validation texts", f"{value:.4f}") for name, value in measured.items()),
        ("sparsity of the targeted weights", f"{result.summary.sparsity:.4%}"),
        ("targeted weights in the file", files.size_line(weights)),
        ("seed", str(recipe.seed)),
        ("time per step", f"{result.seconds_per_step * 1e3:.1f} ms (median)"),
        ("threads", str(torch.get_num_threads())),
        ("versions", f"{versions}, Python {platform.python_version()}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# Run report\n\nThe recipe as it ran is `recipe.yaml` beside this file.\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Sparsity\n\n```\n{result.summary}\n```\n"
    )
