"""Token ids and vocabulary sizes in configs, generation configs and attributes of modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

NewId = Callable[[int], int | None]

IDS = re.compile(
    r"(^|_)(token_ids?|token_index|tokens_ids)$"
    r"|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$|^(lang|task)_to_id$"
    r"|^(pad|eos|bos|unk|mask)_index$|^(image_start|slice_start|slice_end|newline)_id$"
)
"""Names of what holds token ids: numbers, or lists of them. See also `forced_decoder_ids` and `sequence_bias`."""

SIZES = ("vocab_size", "n_words", "vocab_size_per_layer_input")
"""Names of what holds the size of a vocabulary, in configs and modules."""


def configs_of(model: nn.Module) -> list[Any]:
    """Return the configs and generation configs of a model and its parts, nested ones too, each once."""
    found: dict[int, Any] = {}
    waiting = [
        getattr(module, name, None)
        for module in model.modules()
        if hasattr(module, "get_input_embeddings")
        for name in ("config", "generation_config")
    ]
    while waiting:
        config = waiting.pop(0)
        if config is not None and hasattr(config, "to_dict") and id(config) not in found:
            found[id(config)] = config
            waiting.extend(vars(config).values())
    return list(found.values())


def speaks_of(config: Any, rows: int) -> bool:
    """Return whether the ids of a config are those of this vocabulary; a codec beside the text has one of its own."""
    size = getattr(config, "vocab_size", None)
    return size is None or size == rows


def named_ids(config: Any) -> set[int]:
    """Return every token id that a config names."""
    return {found for name, value in vars(config).items() for found in _ids(name, value)}


def renumber(config: Any, new_id: NewId, sizes: dict[int, int]) -> None:
    """Put new ids and sizes into a config, in place.

    Args:
        new_id: of an old one; ids that are not of the vocabulary stay.
        sizes: new number of tokens by the old one.
    """
    for name, value in list(vars(config).items()):
        changed = _changed(name, value, new_id)
        if changed is not value:
            setattr(config, name, changed)
    stated = {name: getattr(config, name, None) for name in SIZES}  # read first: some are two names of one
    for name, size in stated.items():
        if size in sizes:
            setattr(config, name, sizes[size])


def renumber_modules(model: nn.Module, new_id: NewId, sizes: dict[int, int], tables: set[nn.Module]) -> None:
    """Put new ids and sizes into what modules have copied from their configs.

    Args:
        tables: the embeddings themselves. Other embeddings with a padding count positions.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module not in tables:
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, int) and not isinstance(value, bool):
                if name == "padding_idx" or IDS.search(name):
                    setattr(module, name, _one(value, new_id))
                elif name in SIZES and value in sizes:
                    setattr(module, name, sizes[value])


def _ids(name: str, value: Any) -> Iterator[int]:
    if name == "forced_decoder_ids":
        yield from (pair[1] for pair in value or () if isinstance(pair[1], int))
    elif name == "sequence_bias":
        for sequence, _ in _entries(value):
            yield from _ids("token_ids", list(sequence))
    elif not IDS.search(name) or isinstance(value, bool):
        return
    elif isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        yield from (found for inner in value.values() for found in _ids("token_ids", inner))
    elif isinstance(value, list | tuple):
        yield from (found for inner in value for found in _ids("token_ids", inner))


def _changed(name: str, value: Any, new_id: NewId) -> Any:
    if name == "forced_decoder_ids" and value:
        return [[position, token if token is None else _one(token, new_id)] for position, token in value]
    if name == "sequence_bias" and value:
        entries = [(_nested(list(sequence), new_id), bias) for sequence, bias in _entries(value)]
        return {tuple(key): bias for key, bias in entries} if isinstance(value, dict) else [list(e) for e in entries]
    return _nested(value, new_id) if IDS.search(name) else value


def _entries(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else [(entry[0], entry[1]) for entry in value or ()]


def _nested(value: Any, new_id: NewId) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return _one(value, new_id)
    if isinstance(value, list | tuple):
        return type(value)(_nested(inner, new_id) for inner in value)
    return {key: _nested(inner, new_id) for key, inner in value.items()} if isinstance(value, dict) else value


def _one(value: int, new_id: NewId) -> int:
    new = new_id(value)
    return value if new is None else new
