"""Pruning or compacting a saved model: load, remove, save, without training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.sparsity import COMPRESSIONS, SCORERS, SELECTIONS, GroupConfig, SparsityConfig
from ..errors import RecipeError
from ..hf.auto import check_length, default_length, is_causal, load_image_processor, load_tokenizer, load_whole
from ..hf.conversion.download import fetched
from ..hf.embedding.module_files import carry_modules
from ..hf.hub.model_card import BEFORE_COMPACTION, CARD, MEASURED, forget, is_ours
from ..hf.large.checkpoint import sparsify_checkpoint
from ..hf.large.device_map import DeviceMap, check_device_map
from ..hf.large.lazy_model import empty_model
from ..hf.large.work_folder import NAME as WORK
from ..pruning.compaction import compact
from ..pruning.oneshot import sparsify
from ..pruning.summary import Summary, summarize
from ..utils.atomic_io import read_json, replace_file, write_text
from ..vocabulary import carry_report
from .data import load_split, read_columns
from .data_loader import LabelledBatches, TextBatches, has_labels
from .sections import DataSection
from .texts import TEXT_SUFFIXES, Bos, TokenStream, calibration_batches, read_text

logger = logging.getLogger(__name__)

SEQUENCES, SEQUENCE_LENGTH = 128, 2048
"""Of text that is calibrated with, by default; shorter where the model takes fewer tokens."""


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """Sequences of a text, for scorers that look at the inputs of layers.

    Args:
        path: of a plain text, or of a file of examples.
        column: of the latter.
        samples: sequences, from random places.
        length: tokens of a sequence; None = 2048, or what the model takes.
        seed: of the places.
        bos: see `TokenStream.of`.
        unread: options that name what is not read where a text is, for a warning.
    """

    path: str
    column: str = "text"
    samples: int = SEQUENCES
    length: int | None = None
    seed: int = 0
    bos: Bos = "auto"
    unread: Sequence[str] = ()

    @property
    def plain(self) -> bool:
        """Whether it is plain text, and not a file of examples."""
        return Path(self.path).suffix.lower() in TEXT_SUFFIXES

    def batches(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
        """Return the sequences as keyword arguments of a model.

        Raises:
            RecipeError: if the text is too short, or a sequence too long for the model.
        """
        if self.unread:
            logger.warning(
                f"{' and '.join(self.unread)} is not used: {type(model).__name__} is shown sequences of the text in "
                f"column '{self.column}' of {self.path}, without labels"
            )
        length = default_length(SEQUENCE_LENGTH, model, tokenizer) if self.length is None else self.length
        check_length(length, model, tokenizer, special=0)
        stream = TokenStream.of(read_text(self.path, self.column), tokenizer, self.bos, ends=not is_causal(model))
        logger.info("%d sequences of %d tokens, %s", self.samples, length, stream.begins)
        device = "cpu" if model.device.type == "meta" else model.device
        return calibration_batches(stream, self.samples, length, self.seed, device)


def looks_at_inputs(config: GroupConfig) -> bool:
    """Return whether a group looks at the inputs of layers, for which a text without labels is enough."""
    selection = None if config.selection is None else SELECTIONS.build(config.selection)
    wants = SCORERS.build(config.scorer).source == "inputs" or (selection is not None and selection.needs_inputs)
    compress = None if config.compress is None else COMPRESSIONS.build(config.compress)
    return wants or config.reconstruction is not None or (compress is not None and compress.needs_inputs)


@contextlib.contextmanager
def computing_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Turn weights of 16 bits into float32 on the CPU, where they are slow and inexact, and back at the end."""
    stored = {}
    if model.device.type == "cpu":
        stored = {n: p.dtype for n, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for name, parameter in model.named_parameters():
        if name in stored:
            parameter.data = parameter.data.float()
    yield
    for name, parameter in model.named_parameters():
        if name in stored:
            parameter.data = parameter.data.to(stored[name])


def prune(
    name: str,
    group: Mapping[str, Any],
    output: str | os.PathLike[str],
    revision: str = "main",
    section: DataSection | None = None,
    batch: int = 16,
    text: CalibrationText | None = None,
) -> Summary:
    """Load a model, prune it, and save it packed with its tokenizer.

    Args:
        name: folder or Hub name.
        group: the keys of one group, see `GroupConfig`.
        output: folder that is written.
        revision: branch, tag or commit on the Hub.
        section: whose training examples are shown to scorers that look at data, where the model is not a causal
            language model. A model without a head needs no labels for scorers that look at the inputs of layers.
        batch: examples at once.
        text: shown to scorers that look at data, where the model is a causal language model; a plain one also to
            scorers that look at the inputs of layers of any encoder.

    Raises:
        RecipeError: if model or data cannot be loaded, the model cannot be pruned as requested, or the folder holds an
            interrupted run from file to file.
    """
    config = SparsityConfig(**group)
    _refuse_interrupted(Path(output))
    model = load_whole(name, revision)
    by_blocks = looks_at_inputs(config.groups[0])
    by_loss = SCORERS.build(config.groups[0].scorer).source in ("gradients", "heads")
    batches: Any = None
    with computing_in_float32(model) if by_blocks else contextlib.nullcontext():
        if text is not None and _takes_text(model, text, by_blocks, by_loss):
            batches = text.batches(model, load_tokenizer(name, revision))
            if not by_blocks:
                batches = tqdm([{**each, "labels": each["input_ids"]} for each in batches], desc="Calibrating")
        elif section is not None:
            batches = tqdm(_examples(model, name, revision, section, batch, by_blocks), desc="Calibrating")
        sparsify(model, config, batches)
    save_model(model, name, output, revision)
    return summarize(model)


def _refuse_interrupted(output: Path) -> None:
    """Refuse a folder with a run from file to file that is not finished, and would go on over what is written now."""
    if (output / WORK).exists():
        raise RecipeError(
            f"{output} holds an interrupted run of `prune --device-map` or sparsify_checkpoint: repeat it to go on, or "
            f"remove {output / WORK}, or choose another folder"
        )


def prune_files(
    name: str,
    group: Mapping[str, Any],
    output: str | os.PathLike[str],
    device_map: DeviceMap,
    revision: str = "main",
    section: DataSection | None = None,
    batch: int = 16,
    text: CalibrationText | None = None,
) -> str:
    """Prune a model from file to file, of which one block is in memory at a time (`sparsify_checkpoint`).

    Args:
        name, group, output, revision, section, batch, text: as of `prune`; without data for scorers of weights alone.
        device_map: as of `sparsify_checkpoint`.

    Returns:
        What was written, as text.

    Raises:
        RecipeError, CheckpointError: as `sparsify_checkpoint`.
        HubError: if the model cannot be downloaded.
    """
    check_device_map(device_map)
    source = fetched(name, revision)
    model = empty_model(source)
    batches: Any = None
    if not looks_at_inputs(SparsityConfig(**group).groups[0]):
        if text is not None or section is not None:
            logger.warning("--data is not read: no scorer, selection or reconstruction looks at inputs of layers")
    elif text is not None and _takes_text(model, text, by_blocks=True, by_loss=False):
        batches = text.batches(model, load_tokenizer(name, revision))
    elif section is not None:
        batches = list(_examples(model, name, revision, section, batch, by_blocks=True))
    manifest = sparsify_checkpoint(source, output, group, batches, device_map=device_map)
    finish_model(model, name, output, revision)
    kept = [manifest.tensors[key] for key in manifest.targets]
    sizes = [math.prod(entry.shape) for entry in kept]
    zeros = 1 - sum(entry.nonzeros for entry in kept) / max(1, sum(sizes))
    return f"{len(kept)} weights with {sum(sizes):,} entries, of which {zeros:.2%} are zero"


def _examples(
    model: PreTrainedModel, name: str, revision: str, section: DataSection, batch: int, by_blocks: bool
) -> TextBatches:
    """Return what is shown to scorers; labels are left out where no head of the model reads them."""
    tokenizer = load_tokenizer(name, revision)
    if by_blocks and not has_labels(model):
        return TextBatches(model, tokenizer, read_columns(section, "train", section.text_columns, None), section, batch)
    return LabelledBatches(model, tokenizer, load_split(section, "train"), section, batch)


def _takes_text(model: PreTrainedModel, text: CalibrationText, by_blocks: bool, by_loss: bool) -> bool:
    """Return whether sequences of a text are enough, without labels."""
    if is_causal(model):
        return by_blocks or by_loss
    return by_blocks and text.plain and not model.config.is_encoder_decoder


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
    save_model(model, name, output, revision)
    _carry_over(Path(name), Path(output))
    after = model.num_parameters()
    left = [f"{where}: {cut.count} of {cut.before} {kind}" for kind, where, cut in edits]
    return "\n".join([*left, f"{before:,} parameters before, {after:,} after ({after / before:.1%})"])


def forget_run(folder: Path) -> None:
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


def save_model(model: PreTrainedModel, name: str, output: str | os.PathLike[str], revision: str) -> None:
    """Save a model made of another, with its tokenizer or image processor and its modules of sentence-transformers.

    Args:
        name, revision: of the model that it was made of.
    """
    model.save_pretrained(output)
    finish_model(model, name, output, revision)


def finish_model(model: PreTrainedModel, name: str, output: str | os.PathLike[str], revision: str) -> None:
    """Put beside the weights of a model that was made of another what goes with them, as `save_model`."""
    forget_run(Path(output))
    carry_report(name, output)
    carry_modules(name, output, revision)
    images = model.main_input_name == "pixel_values"
    try:
        load = load_image_processor if images else load_tokenizer
        load(name, revision).save_pretrained(output)
    except RecipeError as error:
        logger.warning("no %s was copied: %s", "image processor" if images else "tokenizer", error)
