"""Text for the task causal-lm: examples, or plain text, packed into sequences of one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import RecipeError
from ..utils.validation import check_integer
from .data import SUBSET_SEED, LabelledExamples, read_columns
from .sections import DataSection
from .texts import TEXT_SUFFIXES, TokenStream, read_plain


@dataclasses.dataclass(frozen=True)
class PackedText(LabelledExamples):
    """Text that is packed when it is tokenized.

    Examples follow each other with the tokenizer's EOS between them; each sequence begins as the tokenizer begins a
    text (BOS). What is left at the end and does not fill a sequence is left out.

    Args:
        train, validation: datasets with a column "text".
        most: sequences of train and validation; None = all.
    """

    most: tuple[int | None, int | None] = (None, None)

    def tokenized(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, max_target_length: int | None = None
    ) -> tuple[Dataset, Dataset]:
        """Return train and validation as sequences of `max_length` token ids, which are their own labels.

        Raises:
            RecipeError: if a text does not fill one sequence.
        """
        train = _packed("train", self.train["text"], tokenizer, max_length, self.most[0])
        return train, _packed("validation", self.validation["text"], tokenizer, max_length, self.most[1])


def load_text(section: DataSection) -> PackedText:
    """Read the text that a recipe names: plain, or a column of examples.

    Raises:
        RecipeError: for a file or dataset that cannot be read, or a missing column.
    """
    found, most = [], []
    for split in ("train", "validation"):
        given = getattr(section, split)
        plain = section.name is None and Path(given).suffix.lower() in TEXT_SUFFIXES
        if plain:
            found.append(Dataset.from_dict({"text": [read_plain(given)]}))
        else:
            column = section.text_columns[0]
            found.append(read_columns(section, split, (column,), None).rename_column(column, "text"))
        most.append(getattr(section, f"{split}_samples") if plain else None)
    return PackedText(found[0], found[1], (), ("text",), (most[0], most[1]))


def _packed(
    split: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, most: int | None
) -> Dataset:
    ids: list[int] = []
    for text in texts:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(int(tokenizer.eos_token_id))
        stream = TokenStream.of(text, tokenizer)
        ids += stream.ids
    prefix = stream.prefix
    check_integer("data.max_length", length, f"[{len(prefix) + 2}, inf)")
    body = length - len(prefix)
    rows = [[*prefix, *ids[start : start + body]] for start in range(0, len(ids) - body + 1, body)]
    if not rows:
        raise RecipeError(
            f"data.{split} has {len(ids)} tokens, and a sequence has {body}: lower data.max_length, or give more text"
        )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return dataset if most is None or most >= len(rows) else dataset.shuffle(seed=SUBSET_SEED).select(range(most))
