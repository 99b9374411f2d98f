"""Inputs to trace and to compare an exported model with: token ids, masks, and which of their sizes are free."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from ...errors import RecipeError
from ..auto import most_tokens

DEFAULT_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A batch: its rows, its tokens, and the most tokens that the model can take (None = any number)."""

    batch: int
    length: int
    longest: int | None = None

    @property
    def decoder_length(self) -> int:
        """Tokens of the decoder, another number than the encoder's wherever possible: they must not be tied."""
        return self.length // 2 + 1

    def compared(self, *, bounded: bool) -> list[Sizes]:
        """Return the sizes to compare outputs at: those of the sample, a single short row, and where free, larger.

        Example:
            >>> [(sizes.batch, sizes.length) for sizes in Sizes(2, 8, longest=10).compared(bounded=False)]
            [(2, 8), (1, 4), (3, 10)]
        """
        found = [self, Sizes(1, max(1, self.length // 2), self.longest)]
        if not bounded:
            found.append(Sizes(self.batch + 1, min(self.length + 3, self.longest or self.length + 3), self.longest))
        return found


def sizes_for(model: PreTrainedModel, batch: int, length: int | None) -> Sizes:
    """Return the sizes of a sample for a model.

    Raises:
        RecipeError: if the model takes no text, or the sizes do not fit it.
    """
    name = type(model).__name__
    if model.main_input_name != "input_ids" or name.endswith("ForMultipleChoice"):
        takes = model.main_input_name if model.main_input_name != "input_ids" else "several sequences per row"
        raise RecipeError(f"export is for models that take one row of input_ids per example, but {name} takes {takes}")
    if (
        name.endswith("ForSequenceClassification")
        and "decoder_input_ids" in inspect.signature(model.forward).parameters
    ):
        raise RecipeError(
            f"{name} looks for the end token of every text, so what it computes depends on the tokens and cannot be "
            "traced; export an encoder with a classification head instead"
        )
    longest = most_tokens(model)
    if length is None:
        length = min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    for key, value in (("batch", batch), ("length", length)):
        if value < 2:
            raise RecipeError(f"`{key}` must be at least 2, got {value}: tracing would fix a size of 0 or 1")
    if longest is not None and length > longest:
        raise RecipeError(f"`length` must be at most the {longest} tokens that {name} takes, got {length}")
    return Sizes(batch, length, longest)


def sample(model: PreTrainedModel, sizes: Sizes) -> dict[str, Tensor]:
    """Return a batch of random token ids, always the same one, whose last row is padded to half of its length.

    Shapes:
        all (batch, length), but `decoder_input_ids` (batch, decoder_length)
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    config = model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None) or 0

    def tokens(length: int) -> Tensor:
        ids = torch.randint(embeddings.num_embeddings, (sizes.batch, length), generator=generator)
        return torch.where(ids == pad, (pad + 1) % embeddings.num_embeddings, ids)

    accepted = inspect.signature(model.forward).parameters
    inputs = {"input_ids": tokens(sizes.length)}
    if "attention_mask" in accepted:
        mask = torch.ones_like(inputs["input_ids"])
        mask[-1, (sizes.length + 1) // 2 :] = 0
        inputs["attention_mask"] = mask
        inputs["input_ids"] = torch.where(mask == 0, pad, inputs["input_ids"])
    if "token_type_ids" in accepted and (kinds := getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.randint(kinds, inputs["input_ids"].shape, generator=generator)
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens(sizes.decoder_length)
    return {name: value.to(model.device) for name, value in inputs.items()}


def dynamic_sizes(inputs: dict[str, Tensor], largest: Sizes | None) -> dict[str, dict[int, Any]]:
    """Say which sizes are free: rows and tokens of every input, up to `largest` where that is given."""
    if largest is None:
        return {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    rows, length = Dim("rows", min=1, max=largest.batch), Dim("length", min=1, max=largest.length)
    decoder = Dim("decoder_length", min=1, max=largest.decoder_length)
    return {name: {0: rows, 1: decoder if name.startswith("decoder") else length} for name in inputs}
