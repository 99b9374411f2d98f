"""What a benchmark gives to a model: random tokens of one length, or examples with the lengths that they have."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..hf.auto import default_length, load_tokenizer, most_tokens
from ..recipe.data import read_columns
from ..recipe.data_loader import TextBatches
from ..recipe.sections import DataSection

LENGTH = 128
"""Tokens of each example, where nothing else is requested."""
LONGEST = 512
"""Tokens of a text, where nothing else is requested and the model takes more."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples whose lengths a benchmark has.

    Args:
        path: file of examples.
        columns: with the text, one or two.
        samples: examples, drawn at random; the same ones for every model.
    """

    path: str
    columns: Sequence[str] = ("text",)
    samples: int = 256


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Batches, as keyword arguments of a model.

    Args:
        batches: all are given to the model in one round.
        length: tokens of the longest example.
        count: examples.
        examples: how long they are, in words; None = all have that length.
    """

    batches: list[dict[str, Tensor]]
    length: int
    count: int
    examples: str | None = None


def inputs_of(
    model: PreTrainedModel, batch: int, length: int | None, examples: Examples | None, name: str, revision: str = "main"
) -> Inputs:
    """Return random tokens, or examples in batches of like lengths, each padded to its longest.

    Args:
        length: tokens of each example, or the most that is kept of a text; None = what the model takes, at most 128
            tokens that are random and 512 of a text.
        name, revision: of the model, for its tokenizer.

    Raises:
        RecipeError: if the model does not take that many tokens, or the examples cannot be read or padded.
    """
    if examples is None:
        length = min(LENGTH, most_tokens(model) or LENGTH) if length is None else length
        return Inputs([make_inputs(model, batch, length)], length, batch)
    tokenizer = load_tokenizer(name, revision)
    if tokenizer.pad_token is None and batch > 1:
        raise RecipeError(
            f"'{name}' has no token for padding, so examples of several lengths cannot be one batch: --batch 1"
        )
    section = DataSection(
        train=examples.path,
        validation="none",
        text=list(examples.columns),
        label=f"not {examples.columns[0]}",  # which nothing reads
        train_samples=examples.samples,
        max_length=default_length(LONGEST, model, tokenizer) if length is None else length,
    )
    rows = read_columns(section, "train", section.text_columns, None)
    columns = [list(rows[column]) for column in section.text_columns]
    tokens = tokenizer(*columns, truncation=True, max_length=section.max_length)["input_ids"]
    lengths = [len(each) for each in tokens]
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = [
        each | (_decoder_inputs(each) if model.config.is_encoder_decoder else {})
        for each in TextBatches(model, tokenizer, rows.select(order), section, batch)
    ]
    said = f"{len(rows)} of {Path(examples.path).name}, {min(lengths)} to {max(lengths)} tokens, median "
    return Inputs(batches, max(lengths), len(rows), f"{said}{statistics.median(lengths):g}")


def make_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Return random tokens; those of the decoder too, where there is one."""
    config: Any = model.config
    longest = most_tokens(model)
    if longest is not None and length > longest:
        raise RecipeError(f"`length` must be at most the {longest} positions of the model, got {length}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    if config.is_encoder_decoder and isinstance(end := config.eos_token_id, int):
        ids = torch.where(ids == end, (end + 1) % config.vocab_size, ids)
        ids[:, -1] = end  # a classifier reads its prediction at the one end token of each example
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | (_decoder_inputs(inputs) if config.is_encoder_decoder else {})


def _decoder_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"decoder_input_ids": inputs["input_ids"]}
