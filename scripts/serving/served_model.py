"""A model that many threads call, and what requests of text-embeddings-inference ask of it; for server.py."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_sparse
from hf_sparse.errors import CheckpointError
from hf_sparse.hf.auto import default_length, load_tokenizer, load_whole
from hf_sparse.hf.embedding.pooling import Pooling, has_modules, load_sentence_transformer
from hf_sparse.hf.embedding.wrapper import inner_model, is_wrapper
from hf_sparse.utils.atomic_io import read_json

MOST_TEXTS = 32
"""Of one request, as in text-embeddings-inference."""
LONGEST = 512
"""Tokens of a text."""


class RequestError(Exception):
    """What is wrong with a request.

    Args:
        status: of HTTP.
    """

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.UNPROCESSABLE_ENTITY) -> None:
        super().__init__(message)
        self.status = status


class Model:
    """A model that many threads call.

    Args:
        folder: of a checkpoint, or of a runtime form.
        backend: of `to_runtime`; "dense" = as it was saved. A runtime form has its own.
    """

    def __init__(self, folder: str, backend: str = "auto") -> None:
        self.folder, self.local = folder, threading.local()
        self.model: Any = load(folder, backend)
        inner: Any = inner_model(self.model)
        self.inner = inner
        self.tokenizer = load_tokenizer(folder)
        self.length = default_length(LONGEST, inner, self.tokenizer)
        self.labels: dict[int, str] = inner.config.id2label or {}
        self.gives_scores = hasattr(inner, "classifier") or hasattr(inner, "score")
        self.pooling = None if is_wrapper(self.model) or self.gives_scores else Pooling.of(inner)

    @property
    def kind(self) -> str:
        """What it returns: "embedding", "reranker" or "classifier"."""
        if not self.gives_scores:
            return "embedding"
        return "reranker" if self.inner.config.num_labels == 1 else "classifier"

    def tokens(self, texts: Sequence[Any], truncate: bool) -> Any:
        """Return a padded batch.

        Args:
            texts: or pairs of them.  words: ok
        """
        if not hasattr(self.local, "tokenizer"):  # it keeps how it truncates, so threads must not share one
            self.local.tokenizer = copy.deepcopy(self.tokenizer)
        batch = self.local.tokenizer(list(texts), padding=True, truncation=True if truncate else "do_not_truncate",
                                     max_length=self.length if truncate else None, return_tensors="pt")  # fmt: skip
        if batch["input_ids"].shape[1] > self.length:
            raise RequestError(f"`inputs` must have at most {self.length} tokens; set truncate", HTTPStatus(413))
        return batch

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], normalize: bool, truncate: bool) -> Tensor:
        """Return a vector for each text."""
        batch = self.tokens(texts, truncate)
        if self.pooling is None:
            found: Tensor = self.model(dict(batch))["sentence_embedding"]
        else:
            found = self.pooling(self.inner(**batch), batch)
        return torch.nn.functional.normalize(found, dim=-1) if normalize else found

    @torch.inference_mode()
    def logits(self, texts: Sequence[Any], truncate: bool) -> Tensor:
        """Return the logits of each text or pair."""
        out: Tensor = self.inner(**self.tokens(texts, truncate)).logits
        return out


def load(folder: str, backend: str) -> Any:
    """Return a model in runtime form: mapped if it was saved so, else brought into it."""
    with contextlib.suppress(CheckpointError):
        return hf_sparse.load_runtime(folder)
    said = (read_json(Path(folder) / "config_sentence_transformers.json") or {}).get(
        "model_type", "SentenceTransformer"
    )
    embeds = has_modules(folder) and said == "SentenceTransformer"
    if embeds:
        model: Any = load_sentence_transformer(folder, device="cpu").eval().float()
    else:
        model = load_whole(folder, dtype=torch.float32)
    if backend != "dense":
        print(hf_sparse.to_runtime(model, backend), file=sys.stderr)
    return model


def embed(model: Model, body: dict[str, Any]) -> Any:
    """Compute /embed."""
    given = body.get("inputs")
    texts = [given] if isinstance(given, str) else _texts(given, "inputs")
    found = model.embed(texts, _flag(body, "normalize", True), _flag(body, "truncate", False))
    return found.tolist()


def rerank(model: Model, body: dict[str, Any]) -> Any:
    """Compute /rerank."""
    query, texts = body.get("query"), _texts(body.get("texts"), "texts")
    if not isinstance(query, str) or not query:
        raise RequestError("`query` must be a text that is not empty")
    if model.kind != "reranker":
        raise RequestError(f"the model is of the kind '{model.kind}', and no reranker", HTTPStatus.FAILED_DEPENDENCY)
    logits = model.logits([(query, text) for text in texts], _flag(body, "truncate", False)).flatten()
    scores = (logits if _flag(body, "raw_scores", False) else torch.sigmoid(logits)).tolist()
    with_text = _flag(body, "return_text", False)
    order = sorted(range(len(texts)), key=lambda place: -scores[place])
    return [
        {"index": place, "score": scores[place], **({"text": texts[place]} if with_text else {})} for place in order
    ]


def predict(model: Model, body: dict[str, Any]) -> Any:
    """Compute /predict: of one text, of a pair, or of a list of lists of one or two."""
    given = body.get("inputs")
    if not model.gives_scores:
        raise RequestError("the model has no classifier", HTTPStatus.FAILED_DEPENDENCY)
    single = isinstance(given, str) or (isinstance(given, list) and all(isinstance(text, str) for text in given))
    each = [[given] if isinstance(given, str) else given] if single else given
    if not isinstance(each, list) or not 1 <= len(each) <= MOST_TEXTS:
        raise RequestError(f"`inputs` must be a text, a pair, or a list of 1 to {MOST_TEXTS} of these in lists")
    pairs = [_texts(item, "inputs", most=2) for item in each]
    if len({len(pair) for pair in pairs}) > 1:
        raise RequestError("`inputs` must be single examples or pairs, not both")
    logits = model.logits(
        [pair[0] if len(pair) == 1 else tuple(pair) for pair in pairs], _flag(body, "truncate", False)
    )
    if not _flag(body, "raw_scores", False):
        logits = torch.sigmoid(logits) if logits.shape[1] == 1 else logits.softmax(-1)
    found = [
        sorted(({"score": score, "label": model.labels.get(place, str(place))} for place, score in enumerate(row)),
               key=lambda label: -label["score"])
        for row in logits.tolist()
    ]  # fmt: skip
    return found[0] if single else found


ROUTES: dict[str, Callable[[Model, dict[str, Any]], Any]] = {"/embed": embed, "/rerank": rerank, "/predict": predict}


def _texts(value: Any, name: str, most: int = MOST_TEXTS) -> list[str]:
    good = isinstance(value, list) and 1 <= len(value) <= most and all(isinstance(text, str) for text in value)
    if not good:
        raise RequestError(f"`{name}` must be a list of 1 to {most} strings")
    return list(value)


def _flag(body: dict[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"`{name}` must be true or false")
    return default if value is None else value
