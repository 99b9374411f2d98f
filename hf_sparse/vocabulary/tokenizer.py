"""A fast tokenizer of transformers, read as JSON, and the same tokenizer with fewer tokens."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import RecipeError
from .kinds import KINDS, TokenizerKind

NewId = Callable[[int], int | None]

_TO_ID = re.compile(r"(^|_)(to_ids?|cur_lang_code|cur_lang_code_id)$")
_FROM_ID = re.compile(r"^ids?_to_")
"""Attributes of tokenizers of several languages that hold ids, as values and as keys."""

_STATE = ("_vocab", "_vocab_scores", "_merges")
"""Attributes that hold the vocabulary from which a tokenizer was built."""


class TokenizerFile:
    """The content of tokenizer.json.

    Args:
        data: as `tokenizers.Tokenizer.to_str` writes it.

    Attributes:
        kind: the vocabulary.

    Raises:
        RecipeError: for a kind that is not known.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        name = data["model"]["type"]
        if name not in KINDS:
            raise RecipeError(
                f"the vocabulary of a {name} tokenizer cannot be trimmed; known kinds: {', '.join(KINDS)}"
            )
        self.kind: TokenizerKind = KINDS[name](data["model"])
        self.added = {token["content"]: int(token["id"]) for token in data["added_tokens"]}

    @property
    def ids(self) -> dict[str, int]:
        """Id of each token, added ones too."""
        return {**self.kind.ids, **self.added}

    def named(self) -> set[int]:
        """Return the added tokens, and those that the post-processor puts around a sequence."""
        found = set(self.added.values())
        _processor(self.data.get("post_processor"), lambda token: found.add(token) or token)  # type: ignore[func-returns-value]
        return found

    def trimmed(self, new_id: NewId) -> str:
        """Return the JSON with the tokens that have a new id; everything else is unchanged."""
        data = {**self.data, "model": self.kind.trimmed(new_id)}
        data["added_tokens"] = [{**token, "id": new_id(token["id"])} for token in self.data["added_tokens"]]
        data["post_processor"] = _processor(self.data.get("post_processor"), new_id)
        if data.get("padding") is not None:
            data["padding"] = {**data["padding"], "pad_id": new_id(data["padding"]["pad_id"])}
        return json.dumps(data, ensure_ascii=False)


def _processor(part: Any, new_id: NewId) -> Any:
    """Return a post-processor with new ids.

    Raises:
        RecipeError: for a kind of post-processor that is not known: it may hold ids.
    """
    if part is None:
        return None
    kind = part["type"]
    if kind == "Sequence":
        return {**part, "processors": [_processor(inner, new_id) for inner in part["processors"]]}
    if kind == "TemplateProcessing":
        special = {
            name: {**token, "ids": [new_id(token_id) for token_id in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
        return {**part, "special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**part, **{key: [part[key][0], new_id(part[key][1])] for key in ("sep", "cls")}}
    if kind != "ByteLevel":
        raise RecipeError(f"the tokenizer has a post-processor '{kind}', whose token ids hf_sparse cannot renumber")
    return part


def read_tokenizer(tokenizer: Any) -> TokenizerFile:
    """Return the content of the tokenizer.json of a tokenizer.

    Raises:
        RecipeError: for tokenizers without one: those of bytes and characters, and those written in Python.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = type(tokenizer).__name__
    if backend is None and hasattr(tokenizer, "_utf_vocab_size"):
        raise RecipeError(
            f"{name} has a token for each of the 256 bytes and some special ones, so there is nothing to trim"
        )
    if backend is None or not hasattr(backend, "to_str"):
        raise RecipeError(
            f"{name} is not backed by the tokenizers library, so its vocabulary cannot be trimmed. Load a fast "
            "tokenizer: AutoTokenizer.from_pretrained(...), or convert the SentencePiece model to tokenizer.json"
        )
    return TokenizerFile(json.loads(backend.to_str()))


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the special tokens, and of what the chat template writes around messages."""
    found = {int(token) for token in tokenizer.all_special_ids if token is not None}
    for roles in (("system", "user", "assistant"), ("user", "assistant")):
        if not getattr(tokenizer, "chat_template", None):
            break
        messages = [{"role": role, "content": ""} for role in roles]
        # Templates refuse roles they do not have, each with an error of its own.
        with contextlib.suppress(Exception):
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            found.update(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
            break
    return found


@contextlib.contextmanager
def plain(backend: Any) -> Iterator[Any]:
    """Yield a backend that neither truncates nor pads while the block runs."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def replace_backend(tokenizer: Any, backend: Any, trimmed: str, new_id: NewId) -> None:
    """Give a tokenizer of transformers another backend, in place.

    Args:
        trimmed: the JSON of that backend.
        new_id: of an old token.
    """
    tokenizer._tokenizer = backend
    model = json.loads(trimmed)["model"]
    vocab = model["vocab"]
    fresh = {
        "_vocab": vocab if isinstance(vocab, dict) else [tuple(entry) for entry in vocab],
        "_merges": [tuple(pair) for pair in model.get("merges", ())],
    }
    fresh["_vocab_scores"] = fresh["_vocab"]
    for name, value in vars(tokenizer).items():
        if name in _STATE and isinstance(value, dict | list):
            setattr(tokenizer, name, fresh[name])
        elif _TO_ID.search(name):
            setattr(tokenizer, name, _renumbered(value, new_id))
        elif _FROM_ID.search(name) and isinstance(value, dict):
            setattr(tokenizer, name, {_renumbered(key, new_id): kept for key, kept in value.items()})
    # Written next to tokenizer.json, the SentencePiece model of the whole vocabulary would be read as that of this one.
    for holder in (vars(tokenizer), getattr(tokenizer, "init_kwargs", {})):
        for name in ("vocab_file", "merges_file", "vocab", "merges", "tokenizer_file", "added_tokens_decoder"):
            if holder.get(name) is not None:
                holder[name] = None


def _renumbered(value: Any, new_id: NewId) -> Any:
    if isinstance(value, dict):
        return {key: _renumbered(inner, new_id) for key, inner in value.items()}
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    new = new_id(value)
    return value if new is None else new
