"""The embeddings and LM heads of a model: which rows belong to which token, and the same with fewer rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from ..errors import RecipeError
from ..modeling.forms import form_of
from ..modeling.layer_matching import refuse_runtime

GETTERS = ("get_input_embeddings", "get_per_layer_input_embeddings", "get_output_embeddings")
LARGE = 4
"""Times the width that an unknown weight must be high to be taken for a table of tokens."""


@dataclasses.dataclass(eq=False)
class Tables:
    """What a model has for each token.

    Attributes:
        rows: of the input embeddings.
        modules: embeddings and heads, with all that share their weights, by name.
        weights: their weights, each once, by name.
        biases: of heads, also `final_logits_bias`, by name.
    """

    rows: int
    modules: dict[str, nn.Module]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        """Number of entries, shared ones once."""
        return sum(tensor.numel() for tensor in (*self.weights.values(), *self.biases.values()))

    @property
    def bytes(self) -> int:
        """Bytes in memory, shared ones once."""
        tensors = (*self.weights.values(), *self.biases.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @torch.no_grad()
    def keep(self, tokens: list[int]) -> None:
        """Keep the rows of these tokens, in place; parameters stay the same objects, so what is tied stays tied."""
        for tensor in self.weights.values():
            tensor.data = _rows(tensor, tokens, 0)
            tensor.grad = None
        for tensor in self.biases.values():
            tensor.data = _rows(tensor, tokens, -1)
            tensor.grad = None
        for module in self.modules.values():
            height = int(module.weight.shape[0])  # type: ignore[index]
            name = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
            setattr(module, name, height)
        self.rows = sum(token < self.rows for token in tokens)


def _rows(tensor: Tensor, tokens: list[int], axis: int) -> Tensor:
    kept = [token for token in tokens if token < tensor.shape[axis]]
    return tensor.detach().index_select(axis, torch.tensor(kept, dtype=torch.long, device=tensor.device))


def find_tables(model: nn.Module) -> Tables:
    """Return the embeddings and heads of a model.

    Raises:
        RecipeError: if it has none that `get_input_embeddings` returns, or tables that cannot be trimmed: of another
            vocabulary, of hashes or n-grams, quantized, masked, sharded, or not in memory.
        BackendError: if the model is in runtime form.
    """
    refuse_runtime(model, "trimming the vocabulary")
    inputs, per_layer, heads = (dict(_returned(model, getter)) for getter in GETTERS)
    for name, layer in {**inputs, **heads}.items():
        if (form := form_of(layer)) is not None:
            raise RecipeError(
                f"'{name}' has the form '{form.name}'. Trim the vocabulary of the model that had none yet"
            )
    tables = {name: layer for name, layer in inputs.items() if isinstance(layer, nn.Embedding)}
    if not tables:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in inputs.values()})) or "nothing"
        raise RecipeError(
            f"{type(model).__name__} has no table of embeddings for tokens: get_input_embeddings() returns {kinds}"
        )
    rows = next(iter(tables.values())).num_embeddings
    for name, layer in tables.items():
        if layer.num_embeddings != rows:
            raise RecipeError(
                f"the model has two vocabularies: '{next(iter(tables))}' has {rows} rows and '{name}' "
                f"{layer.num_embeddings}. Trim the vocabularies of its parts one by one"
            )
    for name, head in heads.items():
        if not isinstance(head, nn.Linear | nn.Embedding) or head.weight.shape[0] != rows:
            shape = tuple(weight.shape) if isinstance(weight := getattr(head, "weight", None), Tensor) else "no weight"
            raise RecipeError(
                f"the output layer '{name}' is a {type(head).__name__} ({shape}), and not a linear layer with an "
                f"output for each of the {rows} tokens"
            )
    found: dict[str, nn.Module] = {**tables, **per_layer, **heads}
    _check_plain(found)
    weights = _unique({f"{name}.weight": layer.weight for name, layer in found.items()})  # type: ignore[misc]
    tied = {id(weight) for weight in weights.values()}
    for name, module in model.named_modules():
        if any(id(parameter) in tied for parameter in module.parameters(recurse=False)):
            found.setdefault(name, module)
    biases = _unique({name: bias for head in heads for name, bias in _biases(model, head, rows)})
    result = Tables(rows, found, weights, biases)
    _check_no_others(model, result)
    return result


def _returned(model: nn.Module, getter: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield what the getters of a model and its parts return, with its first name."""
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    for module in model.modules():
        try:
            layer = getattr(module, getter)() if hasattr(module, getter) else None
        except (AttributeError, NotImplementedError):
            continue  # a part without embeddings
        if isinstance(layer, nn.Module) and layer in names:
            yield names[layer], layer


def _biases(model: nn.Module, head: str, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Yield what is added to the logits: the bias of a head, and those that modules around it hold."""
    path = head.split(".")
    for depth in range(len(path) + 1):
        prefix = ".".join(path[:depth])
        module = model.get_submodule(prefix)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if "bias" in name and tensor.shape and tensor.shape[-1] == rows == tensor.numel():
                yield f"{prefix}.{name}".lstrip("."), tensor


def _unique(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor once, under its first name."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name] for name in names.values()}


def _check_plain(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        weight: Any = layer.weight
        if parametrize.is_parametrized(layer):
            raise RecipeError(f"'{name}' has a mask or another parametrisation. End the pruning first: Pruner.bake()")
        if weight.is_meta:
            raise RecipeError(f"'{name}' is not in memory (meta device). Load the whole model into memory first")
        if isinstance(weight, DTensor):
            raise RecipeError(f"'{name}' is sharded. Trim the vocabulary before the model is sharded")
        if not weight.is_floating_point() or weight.ndim != 2:
            raise RecipeError(f"'{name}' is quantized ({weight.dtype}). Trim the vocabulary before it is quantized")


def _check_no_others(model: nn.Module, tables: Tables) -> None:
    """Refuse a model that uses token ids in ways that no getter tells."""
    known = {id(weight) for weight in tables.weights.values()}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or id(weight) in known:
            continue
        if isinstance(module, nn.Embedding) and any(word in name.lower() for word in ("hash", "ngram", "n_gram")):
            raise RecipeError(
                f"'{name}' is indexed by hashes or n-grams of token ids, which new ids would change. The vocabulary of "
                f"{type(model).__name__} cannot be trimmed"
            )
        if isinstance(module, nn.Embedding | nn.Linear) and weight.shape[0] == tables.rows > LARGE * weight.shape[1]:
            raise RecipeError(
                f"'{name}' has {tables.rows} rows, one for each token, but no get_input_embeddings() or "
                "get_output_embeddings() returns it. The vocabulary cannot be trimmed without it"
            )
    for module in model.modules():
        if getattr(getattr(module, "config", None), "vocab_offset", None) is not None:
            raise RecipeError(
                f"{type(model).__name__} has further tables for ids behind a `vocab_offset`, which new ids would change"
            )


def positions_from_padding(model: nn.Module, tables: Tables) -> bool:
    """Return whether positions are counted from the id of the padding on, as RoBERTa does: then it must not change."""
    for module in model.modules():
        table = isinstance(module, nn.Embedding) and module not in tables.modules.values()
        if (table or "Position" in type(module).__name__) and isinstance(getattr(module, "padding_idx", None), int):
            return True
    return False
