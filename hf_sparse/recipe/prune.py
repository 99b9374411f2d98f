"""Pruning or compacting a saved model: load, remove, save, without training."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config.sparsity import SparsityConfig
from ..errors import RecipeError
from ..hf.auto import load_tokenizer, load_whole
from ..hf.hub.model_card import BEFORE_COMPACTION, CARD, MEASURED, forget, is_ours
from ..pruning.compaction import compact
from ..pruning.oneshot import sparsify
from ..pruning.summary import Summary, summarize
from ..utils.atomic_io import read_json, replace_file, write_text
from .data import load_split
from .data_loader import LabelledBatches
from .sections import DataSection

logger = logging.getLogger(__name__)


def prune(
    name: str,
    group: Mapping[str, Any],
    output: str | os.PathLike[str],
    revision: str = "main",
    section: DataSection | None = None,
    batch: int = 16,
) -> Summary:
    """Load a model, prune it, and save it packed with its tokenizer.

    Args:
        name: folder or Hub name.
        group: the keys of one group, see `GroupConfig`.
        output: folder that is written.
        revision: branch, tag or commit on the Hub.
        section: whose training examples are shown to scorers that look at data (gradient, taylor, head_importance).
        batch: examples at once.

    Raises:
        RecipeError: if model or data cannot be loaded, or the model cannot be pruned as asked.
    """
    config = SparsityConfig(**group)
    model = load_whole(name, revision)
    batches = None
    if section is not None:
        rows = load_split(section, "train")
        batches = tqdm(LabelledBatches(model, load_tokenizer(name, revision), rows, section, batch), desc="Looking")
    sparsify(model, config, batches)
    _save(model, name, output, revision)
    return summarize(model)


def compact_saved(name: str, output: str | os.PathLike[str], revision: str = "main") -> str:
    """Load a model, remove its pruned heads and neurons, and save it with its tokenizer.

    Args:
        name: folder or Hub name.
        output: folder that is written.
        revision: branch, tag or commit on the Hub.

    Returns:
        What is left, as text.

    Raises:
        RecipeError: if the model cannot be loaded, or has nothing that could be removed.
        PatternError: if no architecture knows it.
    """
    model = load_whole(name, revision)
    before = model.num_parameters()
    edits = compact(model)
    if model.num_parameters() == before:
        raise RecipeError(
            f"'{name}' has no head, neuron or sub-block whose weights are all zero, so there is nothing to remove. "
            "Prune it first, with pattern head, neuron or layer"
        )
    _save(model, name, output, revision)
    _carry_over(Path(name), Path(output))
    after = model.num_parameters()
    left = [f"{where}: {cut.count} of {cut.before} {kind}" for kind, where, cut in edits]
    return "\n".join([*left, f"{before:,} parameters before, {after:,} after ({after / before:.1%})"])


def _forget_run(folder: Path) -> None:
    """Let no record of a model that was there before pass for one of the model that is there now."""
    forget(folder)
    (folder / "trainer_state.json").unlink(missing_ok=True)
    if (folder / "recipe.yaml").is_file():
        (folder / "recipe.yaml").replace(folder / "recipe.yaml.old")
    if (card := folder / CARD).is_file() and is_ours(card.read_text(encoding="utf-8", errors="replace")):
        card.unlink()


def _carry_over(source: Path, output: Path) -> None:
    """Copy what was recorded of a model to the folder of the same model after compaction."""
    if (source / "recipe.yaml").is_file():
        with replace_file(output / "recipe.yaml") as temporary:
            shutil.copyfile(source / "recipe.yaml", temporary)
    if (measured := read_json(source / MEASURED)) is not None:
        text = json.dumps({**measured, BEFORE_COMPACTION: True}, indent=4)
        write_text(output / MEASURED, text + "\n")


def _save(model: PreTrainedModel, name: str, output: str | os.PathLike[str], revision: str) -> None:
    model.save_pretrained(output)
    _forget_run(Path(output))
    try:
        load_tokenizer(name, revision).save_pretrained(output)
    except RecipeError as error:
        logger.warning("no tokenizer was copied: %s", error)
