"""A SentenceTransformer, CrossEncoder or SparseEncoder: what it wraps, and all that it returns, by name.

Nothing here imports sentence-transformers: a model of it that is handed in has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...distillation.terms.base import EMBEDDING
from .. import patches

BASE = "sentence_transformers.base.model"
"""Module of the class that all its models have in common (sentence-transformers 6)."""


def is_wrapper(model: object) -> bool:
    """Return whether a model is one of sentence-transformers."""
    base = getattr(sys.modules.get(BASE), "BaseModel", None)
    return base is not None and isinstance(model, base)


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformer that a model of sentence-transformers wraps; any other model itself."""
    if not is_wrapper(model):
        return model
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return model if inner is None else inner


def gives_embeddings(model: nn.Module) -> bool:
    """Return whether a model returns embeddings and no logits: without a head, or with pooling in its place."""
    inner = inner_model(model)
    return isinstance(inner, PreTrainedModel) and inner.base_model is inner and not inner.config.is_encoder_decoder


def features_of(trainer: Any, model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a model is called with for a batch of a Trainer of sentence-transformers, once for each column.

    Args:
        trainer: of sentence-transformers.
        model: a wrapper.
        inputs: a batch of its collator.
    """
    options = {key: inputs[key] for key in ("prompt", "task") if key in inputs}
    columns, _ = trainer.collect_features({k: v for k, v in inputs.items() if k not in (*options, "dataset_name")})
    if columns and isinstance(columns[0], list):  # sentences: the loss of a CrossEncoder tokenizes them
        wrapper: Any = model
        tokens = wrapper.preprocess(list(zip(*columns, strict=True)), **options)
        columns = [{key: _moved(value, wrapper.device) for key, value in tokens.items()}]
    return list(columns)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


class Recorder:
    """Keep what the transformer inside a wrapper returns, and ask it for more.

    A wrapper calls `forward` of the transformer itself, which no hook sees; so that method is replaced, until `remove`.

    Args:
        model: the wrapper.
        wanted: returns keyword arguments that the transformer is called with beside the wrapper's own.

    Attributes:
        found: the outputs of the last call, by name.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], Mapping[str, Any]]) -> None:
        self.inner, self.wanted = inner_model(model), wanted
        self.found: dict[str, Any] = {}
        self._before = vars(self.inner).get("forward")  # accelerate may have put one there
        self._forward = self.inner.forward
        patches.put(self.inner, "forward", self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._forward(*args, **{**kwargs, **self.wanted()})
        self.found = dict(outputs)
        return outputs

    def remove(self) -> None:
        """Give the transformer its own `forward` back."""
        patches.take(self.inner, "forward")
        if self._before is not None:
            patches.put(self.inner, "forward", self._before)
        self.found = {}


class NamedOutputs(nn.Module):
    """A model of sentence-transformers, called with inputs by name as a model of transformers is.

    Args:
        wrapped: a SentenceTransformer, CrossEncoder or SparseEncoder.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, output_hidden_states: bool = False, output_attentions: bool = False, **features: Any) -> Any:
        """Return the outputs of the transformer inside, and the embedding if there is one."""
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        recorder = Recorder(self.wrapped, lambda: {key: True for key, value in wanted.items() if value})
        try:
            returned = self.wrapped(dict(features))  # a copy, because the modules write into it
            return with_embedding(recorder.found, returned)
        finally:
            recorder.remove()


def with_embedding(found: Mapping[str, Any], returned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs of a transformer, and the embedding or score that a wrapper made of them."""
    return {**found, **({EMBEDDING: returned[EMBEDDING]} if EMBEDDING in returned else {})}
