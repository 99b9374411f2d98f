"""Which weights of a model are meant: the default, shell globs, and what to say when nothing matches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import BackendError, RecipeError

BACK = "call hf_sparse.to_dense_runtime(model) first"
"""How a model in runtime form becomes a plain one, at the end of what such a model refuses."""


class InRuntimeForm:
    """Mixin of layers that are packed for inference: no weight in them could be pruned, cut or loaded into."""

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            error_msgs.append(f"'{prefix}weight' is packed for inference and cannot be loaded into: {BACK}")


def refuse_runtime(model: nn.Module, asked: str) -> None:
    """Raise `BackendError` if a model is in runtime form.

    Args:
        asked: for what, the subject of the error.
    """
    packed = next((name for name, module in model.named_modules() if isinstance(module, InRuntimeForm)), None)
    if packed is not None:
        raise BackendError(
            f"{asked} needs plain layers, and the {type(model).__name__} is in runtime form ('{packed}' is packed for "
            "inference). Call hf_sparse.to_dense_runtime(model) first, and hf_sparse.to_runtime(model) again afterwards"
        )


def parameter_owners(model: nn.Module) -> Counter[int]:
    """Return by `id` of each parameter how many modules hold it; more than one if it is tied."""
    return Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))


def prunable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer by name, but those that share their weight with another module (tied embeddings).

    Layers that compaction has left empty are none.
    """
    owners = parameter_owners(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and owners.get(id(module._parameters.get("weight")), 1) == 1
        and (module.in_features and module.out_features)
    }


def block_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside the transformer blocks: those below an `nn.ModuleList`.

    Blocks are repeated, so every model of transformers keeps them in a list; embeddings, poolers and task heads stand
    beside it.
    """
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name]
    return {
        name: module
        for name, module in prunable_layers(model).items()
        if any(name.startswith(prefix) for prefix in lists)
    }


def match_layers(model: nn.Module, targets: Sequence[str] | None, exclude: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Return the layers that a group means, by name.

    Args:
        targets: shell globs over names of modules (or of their weights); None = `block_layers`.
        exclude: globs of what to leave out.

    Raises:
        RecipeError: if nothing is left, or a glob matches nothing, with a list of what could have matched; if adapters
            are on the model, which would be pruned too, and undone when they are merged.
        BackendError: if the model is in runtime form.
    """
    refuse_runtime(model, "pruning")
    every = prunable_layers(model)
    wrapped = next((name for name in every if name.rpartition(".")[2] == "base_layer"), None)
    if wrapped is not None:
        raise RecipeError(
            f"'{wrapped.removesuffix('.base_layer')}' is wrapped in adapters. Prune the model first and put adapters "
            "on then, or merge them first: merge_and_unload()"
        )
    layers = block_layers(model) if targets is None else {}
    for glob in targets or ():
        found = {name: module for name, module in every.items() if _matches(name, glob)}
        if not found:
            raise RecipeError(f"targets '{glob}' matches no linear layer of the model. {_could_match(every)}")
        layers.update(found)
    for glob in exclude:
        if not any(_matches(name, glob) for name in every):
            raise RecipeError(f"exclude '{glob}' matches no linear layer of the model. {_could_match(every)}")
    layers = {name: module for name, module in layers.items() if not any(_matches(name, glob) for glob in exclude)}
    if not layers:
        asked = "the default targets" if targets is None else f"targets {list(targets)}"
        without = f" without {list(exclude)}" if exclude else ""
        raise RecipeError(f"{asked}{without} match no linear layer of the model. {_could_match(every)}")
    return {name: every[name] for name in every if name in layers}


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(f"{name}.weight", glob)


def _could_match(layers: dict[str, nn.Linear]) -> str:
    if not layers:
        return "It has no linear layers of its own at all."
    # One line per kind of layer, not per layer: numbers become *.
    kinds: dict[str, int] = {}
    for name in layers:
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kinds[kind] = kinds.get(kind, 0) + 1
    listed = ", ".join(f"{kind} ({count})" for kind, count in list(kinds.items())[:40])
    return f"It could match: {listed}."
