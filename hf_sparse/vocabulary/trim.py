"""Trimming: remove the tokens that a domain does not need, from model and tokenizer together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..errors import RecipeError
from ..modeling.model_state import check_model
from ..utils.collection import collection_paused
from .choice import Choice, Criteria, choose, in_scripts, requested_ids
from .counting import TokenCounts, count_tokens
from .held_out import measure
from .report import SHOWN, VocabularyReport
from .tables import Tables, find_tables, positions_from_padding
from .token_ids import configs_of, named_ids, renumber, renumber_modules, speaks_of
from .tokenizer import TokenizerFile, read_tokenizer, replace_backend, special_ids

STRAY = 1024
"""Rows without a token, or tokens without a row, that a model may have: tables are padded to multiples."""


def trim_vocabulary(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] = (),
    *,
    coverage: float | None = None,
    min_count: int | None = None,
    keep: Sequence[str | int] = (),
    scripts: Sequence[str] = (),
    held_out: Iterable[str] | None = None,
    keep_characters: bool = True,
    pad_to_multiple_of: int | None = None,
) -> VocabularyReport:
    """Remove tokens from a model and its tokenizer, in place.

    Special and added tokens stay, single characters and bytes, and what configs and the chat template name; of the rest
    the most frequent ones in a corpus, with the tokens that merges need to make them. A sequence whose tokens are all
    kept is split as before, and its hidden states and the logits of kept tokens do not change. Other sequences are
    split into smaller pieces.

    Args:
        model: whose embeddings `get_input_embeddings` and `get_output_embeddings` return.
        tokenizer: fast tokenizer of transformers: WordPiece, BPE or Unigram.
        texts: sequences of the domain, as the model will see them; read once.
        coverage: fraction of the tokens in `texts` that stay as they are, in (0, 1]; None = all that occur.
        min_count: keep tokens that occur at least this often, in place of a coverage.
        keep: further tokens, as in `tokenizer.get_vocab()`, or their ids.
        scripts: Unicode scripts, such as "Latin" or "Han": tokens written in them alone stay, also unseen ones.
        held_out: other sequences, on which fertility and coverage are measured.
        keep_characters: False also removes single characters that are not needed. They become bytes, and where the
            tokenizer has none, the unknown token.
        pad_to_multiple_of: keep more of the most frequent tokens, until the rows are a multiple of this.

    Returns:
        The report: sizes, coverage, and what changes for held-out sequences.

    Raises:
        RecipeError: for nothing to choose by, values out of range, and models and tokenizers that cannot be trimmed.
            Both are then as they were.
        BackendError: if the model is in runtime form.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> trainer = trainers.WordPieceTrainer(special_tokens=["[PAD]", "[UNK]"], show_progress=False)
        >>> backend.train_from_iterator(["red green blue", "one two three"], trainer)
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
        >>> report = trim_vocabulary(model, tokenizer, ["red green blue"])
        >>> tokenizer.tokenize("red two")
        ['red', 't', '##w', '##o']
        >>> len(tokenizer) == model.config.vocab_size == report.tokens_after < report.tokens
        True
    """  # words: ok
    criteria = Criteria(coverage, min_count, keep, scripts, keep_characters, pad_to_multiple_of)
    check_model(model)
    tables = find_tables(model)
    criteria.check_rows(tables.rows)
    with collection_paused():
        file = read_tokenizer(tokenizer)
    ids, backend = file.ids, tokenizer.backend_tokenizer
    _check_belongs(ids, tables.rows)
    size = max(tables.rows, max(ids.values(), default=-1) + 1)
    configs = [config for config in configs_of(model) if speaks_of(config, tables.rows)]
    special = _special(model, tokenizer, file, tables, configs, size)
    requested = requested_ids(ids, keep, size) | in_scripts(backend, size, scripts)
    counts = count_tokens(backend, texts, size, file.data)
    _check_chosen_by(counts, criteria)
    with collection_paused():
        choice = choose(file.kind, criteria, counts.tokens, special, requested, tables.rows)
        numbers = {old: new for new, old in enumerate(choice.kept)}
        trimmed = file.trimmed(numbers.get)
    after = type(backend).from_str(trimmed)
    _check_ids(after, ids, numbers)
    held = None
    if held_out is not None:
        unknown = None if tokenizer.unk_token is None else ids.get(str(tokenizer.unk_token))
        held = measure(backend, after, held_out, numbers.keys(), (unknown, numbers.get(unknown, -1)))  # type: ignore[arg-type]

    before = _Sizes(model, tables)
    heights = {height: sum(old < height for old in choice.kept) for height in _heights(configs, tables)}
    tables.keep(list(choice.kept))
    for config in configs:
        renumber(config, numbers.get, heights)
    renumber_modules(model, numbers.get, heights, set(tables.modules.values()))
    replace_backend(tokenizer, after, trimmed, numbers.get)
    return _report(file, choice, counts, before, _Sizes(model, tables), held)


def _special(
    model: nn.Module, tokenizer: Any, file: TokenizerFile, tables: Tables, configs: Iterable[Any], size: int
) -> set[int]:
    """Return the tokens that have a role anywhere."""
    found = file.named() | special_ids(tokenizer)
    for config in configs:
        found |= named_ids(config)
    padding = tokenizer.pad_token_id
    if padding is not None and positions_from_padding(model, tables):
        found.update(range(padding + 1))
    return {token for token in found if 0 <= token < size}


def _check_belongs(ids: dict[str, int], rows: int) -> None:
    """Raise if so many rows have no token, or tokens no row, that the tokenizer must be that of another model."""
    with_row = sum(token < rows for token in ids.values())
    if max(rows, len(ids)) - with_row > max(STRAY, rows // 10):
        raise RecipeError(
            f"the tokenizer has {len(ids):,} tokens, and the embeddings have {rows:,} rows, so it is not that of the "
            "model. Load both from one place, or call model.resize_token_embeddings(len(tokenizer)) first"
        )


def _check_ids(after: Any, ids: dict[str, int], numbers: dict[int, int]) -> None:
    """Raise unless the trimmed tokenizer gives every token its new id: `tokenizers` numbers added tokens itself."""
    expected = {text: numbers[token] for text, token in ids.items() if token in numbers}
    if (found := after.get_vocab(True)) != expected:
        wrong = sorted(text for text in found.keys() | expected if found.get(text) != expected.get(text))
        raise RecipeError(
            f"the tokenizer has gaps between its ids, so {len(wrong)} tokens (first: {wrong[0]!r}) would get other ids "
            "than the embeddings have. Remove the gaps first: load and save the tokenizer, and resize the embeddings"
        )


def _check_chosen_by(counts: TokenCounts, criteria: Criteria) -> None:
    if not counts.examples and not criteria.keep and not criteria.scripts:
        raise RecipeError("there is nothing to choose tokens by: give a corpus, or `keep`, or `scripts`")
    if not counts.total and (criteria.coverage is not None or criteria.min_count is not None):
        raise RecipeError("`coverage` and `min_count` need a corpus that has tokens")


def _heights(configs: Iterable[Any], tables: Tables) -> set[int]:
    """Return the sizes of vocabularies that the configs state."""
    stated = {
        getattr(config, name, None) for config in configs for name in ("vocab_size", "vocab_size_per_layer_input")
    }
    if tables.rows not in stated:
        raise RecipeError(f"no config of the model states the {tables.rows} rows of its embeddings as its vocab_size")
    return {height for height in stated if height is not None}


class _Sizes:
    """Sizes of a model at a moment."""

    def __init__(self, model: nn.Module, tables: Tables) -> None:
        self.rows = tables.rows
        self.table_parameters, self.table_bytes = tables.parameters, tables.bytes
        self.model_parameters = sum(parameter.numel() for parameter in model.parameters())


def _report(
    file: TokenizerFile, choice: Choice, counts: TokenCounts, before: _Sizes, after: _Sizes, held: Any
) -> VocabularyReport:
    names = {token: text for text, token in file.ids.items()}
    kept = set(choice.kept)
    order = np.argsort(-counts.tokens, kind="stable")
    removed = [int(token) for token in order if counts.tokens[token] and int(token) not in kept][:SHOWN]
    return VocabularyReport(
        kind=file.kind.name,
        tokens=len(names),
        tokens_after=len(kept & names.keys()),
        **vars(before),
        **{f"{key}_after": value for key, value in vars(after).items()},
        examples=counts.examples,
        corpus_tokens=counts.total,
        coverage=choice.covered / counts.total if counts.total else 1.0,
        reasons=choice.reasons,
        removed=tuple((names.get(token, str(token)), int(counts.tokens[token])) for token in removed),
        curve=choice.curve,
        held_out=held,
        caveat=file.kind.caveat(set(file.added.values())),
    )
