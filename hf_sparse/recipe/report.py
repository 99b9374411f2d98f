"""The report of a training run, and what it measured."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from .._version import __version__
from ..formats.inspection import Inspection
from ..hf.trainer.evaluation import measured
from ..pruning.summary import Summary
from .recipe import Recipe
from .task import Examples


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run measured.

    Args:
        output: folder with the model, tokenizer, recipe, metrics and report.
        metrics: of the validation examples, with the Trainer's names (`eval_accuracy`, ...).
        summary: sparsity of the trained model.
        seconds_per_step: median over the optimizer steps, data loading included, evaluation and saving not.

    Units:
        seconds_per_step in seconds.
    """

    output: Path
    metrics: dict[str, float]
    summary: Summary
    seconds_per_step: float


def report_text(
    recipe: Recipe, examples: Examples, result: RunResult, files: Inspection, changes: Sequence[str] = ()
) -> str:
    """Return the report of a run as Markdown.

    Args:
        files: of the saved model.
        changes: of the configuration in the middle of the run, when it was resumed.
    """
    source = " / ".join(filter(None, (recipe.data.name, recipe.data.config))) or os.path.basename(
        recipe.data.train or ""
    )
    versions = f"hf_sparse {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    weights = None if files.packed else {weight.name for weight in result.summary.weights}
    rows = [
        ("model", os.path.basename(recipe.model.name.rstrip("/\\"))),
        ("data", f"{source}: {len(examples.train)} training examples, {len(examples.validation)} validation examples"),
        *((f"{name} on the validation examples", f"{value:.4f}") for name, value in measured(result.metrics).items()),
        ("sparsity of the targeted weights", f"{result.summary.sparsity:.4%}"),
        ("targeted weights in the file", files.size_line(weights)),
        ("seed", str(recipe.seed)),
        *(("changed on resume", change.replace("|", "\\|")) for change in changes),
        ("time per step", f"{result.seconds_per_step * 1e3:.1f} ms (median)"),
        ("threads", str(torch.get_num_threads())),
        ("versions", f"{versions}, Python {platform.python_version()}"),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# Run report\n\nThe recipe as it ran is `recipe.yaml` beside this file.\n\n| | |\n|---|---|\n{lines}\n\n"
        f"## Sparsity\n\n```\n{result.summary}\n```\n"
    )
