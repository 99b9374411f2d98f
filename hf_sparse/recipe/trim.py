"""Trimming the vocabulary of a saved model, without training."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError, RecipeError
from ..hf.auto import load_tokenizer, load_whole
from ..hf.embedding.module_files import carry_modules
from ..vocabulary import VocabularyReport, trim_vocabulary
from .data import read_column
from .prune import forget_run

logger = logging.getLogger(__name__)

EVERY = 20
"""Of the corpus, one in so many sequences is held out where no other file is given for that."""


def trim_saved(
    name: str,
    output: str | os.PathLike[str],
    data: str | None = None,
    held_out: str | None = None,
    column: str = "text",
    revision: str = "main",
    **criteria: Any,
) -> VocabularyReport:
    """Load a model, remove the tokens that a corpus does not need, and save it with its tokenizer and a report.

    The modules of sentence-transformers beside it are carried over.

    Args:
        name: folder or Hub name.
        output: folder that is written.
        data: corpus: a text file with a sequence in each line, or json, jsonl, csv, tsv or parquet.
        held_out: the same, for the measurements of the report; None = each 20th sequence of `data`.
        column: of a file with columns.
        revision: branch, tag or commit on the Hub.
        **criteria: see `hf_sparse.trim_vocabulary`.

    Raises:
        RecipeError: if model or data cannot be loaded, and as `trim_vocabulary`.
        CheckpointError: if the saved tokenizer does not do what the trimmed one does.
    """
    corpus = [] if data is None else read_column(data, column)
    if held_out is not None:
        measured = read_column(held_out, column)
    else:
        measured, corpus = corpus[EVERY - 1 :: EVERY], [s for i, s in enumerate(corpus) if i % EVERY != EVERY - 1]
    model, tokenizer = load_whole(name, revision), load_tokenizer(name, revision)
    report = trim_vocabulary(model, tokenizer, corpus, held_out=measured or None, **criteria)
    model.save_pretrained(output)
    forget_run(Path(output))
    carry_modules(name, output, revision)
    tokenizer.save_pretrained(output)
    report.save(output)
    _check_saved(tokenizer, str(output), [*measured[:100], *corpus[:100]])
    return report


def _check_saved(tokenizer: PreTrainedTokenizerBase, output: str, sample: Sequence[str]) -> None:
    """Raise unless the saved tokenizer is the one in memory: some classes of transformers build a part of it anew."""
    again = load_tokenizer(output)
    if len(again) != len(tokenizer):
        raise CheckpointError(f"the tokenizer in {output} has {len(again)} tokens, the trimmed one {len(tokenizer)}")
    for sequence in sample:
        if again(sequence, verbose=False)["input_ids"] != tokenizer(sequence, verbose=False)["input_ids"]:
            raise CheckpointError(
                f"the tokenizer in {output} does not do what the trimmed one does: transformers loads it as "
                f"{type(again).__name__}. Load it with PreTrainedTokenizerFast.from_pretrained"
            )


def check_corpus(data: str | None, keep: Sequence[Any], scripts: Sequence[str]) -> None:
    """Raise `RecipeError` where nothing would choose the tokens."""
    if data is None and not keep and not scripts:
        raise RecipeError("there is nothing to choose tokens by: give --data, --keep or --script")
