"""Layer matching: the default targets, shell globs, and errors that name what could have matched."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..config.module_names import ALL_LINEAR, ModuleNames, NamePattern, entries, matches
from ..errors import BackendError, RecipeError
from ..utils.text import kind_of_name
from .blocks import block_coverage, block_prefixes, has_part
from .layer_kinds import MatrixLayer, Slot, is_linear, is_matrix_layer, known_kinds, slots_of
from .ownership import count_owners, names_of

logger = logging.getLogger(__name__)

NEGLIGIBLE = 0.01
"""Fraction of the weights in the blocks that may stay dense without a warning (depthwise convolutions, biases)."""

BACK = "call hf_sparse.to_dense_runtime(model) first"
"""How to restore plain layers: the end of every message that refuses a model in runtime form."""


class InRuntimeForm:
    """Mixin of layers that are packed for inference: their weight cannot be pruned, resized or loaded into."""

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


def refuse_runtime(model: nn.Module, requested: str) -> None:
    """Raise `BackendError` if a model is in runtime form.

    Args:
        requested: the operation, as the subject of the error.
    """
    packed = next((name for name, module in model.named_modules() if isinstance(module, InRuntimeForm)), None)
    if packed is not None:
        raise BackendError(
            f"{requested} needs plain layers, and the {type(model).__name__} is in runtime form ('{packed}' is packed "
            "for inference). Call hf_sparse.to_dense_runtime(model) first, and hf_sparse.to_runtime(model) again "
            "afterwards"
        )


def prunable_weights(model: nn.Module) -> dict[str, Slot]:
    """Return every weight of a known kind, except those that are shared with another module (tied embeddings).

    The name is that of the layer, or of the weight where the module has several. Weights that compaction has left empty
    are left out.
    """
    owners = count_owners(model)
    return {
        path if slot.attribute == "weight" else slot.name(path): slot
        for path, module in model.named_modules()
        for slot in slots_of(module)
        if owners.get(id(module._parameters.get(slot.attribute)), 1) == 1 and all(slot.shape)
    }


def prunable_layers(model: nn.Module) -> dict[str, MatrixLayer]:
    """Return every layer of `prunable_weights`, without the modules that hold several weights."""
    return _layers(prunable_weights(model))


def _layers(weights: Mapping[str, Slot]) -> dict[str, MatrixLayer]:
    return {name: slot.module for name, slot in weights.items() if slot.attribute == "weight"}


def embedding_tables(model: nn.Module) -> dict[str, Slot]:
    """Return every embedding by name, tied ones once: only a target that says "embed", or the very name, matches them.

    A table is a matrix with a row for each token (or position). It may be tied to other embeddings and to an LM head.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding) and weight is not None and weight.ndim == 2:
            found.setdefault(id(weight), (name, module))
    return {name: Slot(module) for name, module in found.values()}


def _says_embedding(glob: NamePattern, name: str) -> bool:
    return "embed" in str(glob).lower() or str(glob) in (name, f"{name}.weight")


def block_layers(model: nn.Module) -> dict[str, MatrixLayer]:
    """Return the default targets: the linear layers inside the blocks, or the convolutions where there are none.

    Embeddings, poolers, projections between parts of the model and task heads are outside the blocks. A model of
    convolutions, without blocks and without attention, has all of them as default targets. Stacked experts and
    convolutions beside linear layers are to be named, see `warn_of_missed`. Routers of experts are left out: they are
    small, and decide for every token.
    """
    every, prefixes, routers = prunable_layers(model), tuple(block_prefixes(model)), _routers(model)
    inside = {
        name: layer for name, layer in every.items() if name.startswith(prefixes) and not f"{name}.".startswith(routers)
    }
    linear = {name: layer for name, layer in inside.items() if is_linear(layer)}
    if linear or prefixes or has_part(model, "Attention", "Attn"):
        return linear or inside
    return {name: layer for name, layer in every.items() if not is_linear(layer)}


def _routers(model: nn.Module) -> tuple[str, ...]:
    """Return the names, with a dot at the end, of what chooses experts or weighs a shared one."""
    found = []
    for path, module in model.named_modules():
        children = module._modules
        chosen = ("router", "gate", "shared_expert_gate") if "experts" in children else ("router",)
        found += [f"{path}.{name}." if path else f"{name}." for name in chosen if name in children]
    return tuple(found)


def match_layers(
    model: nn.Module, targets: Sequence[NamePattern] | None, exclude: Sequence[NamePattern] = ()
) -> dict[str, MatrixLayer]:
    """Return the layers that a group targets, by name, as `match_weights`."""
    return _layers(match_weights(model, targets, exclude))


def match_weights(
    model: nn.Module, targets: Sequence[NamePattern] | None, exclude: Sequence[NamePattern] = ()
) -> dict[str, Slot]:
    """Return the weights that a group targets, by the name of the layer, or of the weight where a module has several.

    Args:
        targets: shell globs over names of modules (or of their weights), or names as in PEFT; None = `block_layers`.
        exclude: the same, of layers to leave out.

    Raises:
        RecipeError: if no layer is left, or a glob or a name of a list matches none, with the reason and
            what could have matched; if the model has adapters, which would be pruned too, and restored when they are
            merged.
        BackendError: if the model is in runtime form.
    """
    refuse_runtime(model, "pruning")
    every = prunable_weights(model)
    wrapped = next((name for name in every if name.rpartition(".")[2] == "base_layer"), None)
    if wrapped is not None:
        raise RecipeError(
            f"'{wrapped.removesuffix('.base_layer')}' is wrapped in adapters. Prune the model first and put adapters "
            "on then, or merge them first: merge_and_unload()"
        )
    default = block_layers(model) if targets is None else {}
    layers, tables = {name: Slot(layer) for name, layer in default.items()}, embedding_tables(model)
    for glob, stated in entries(targets or (), "targets"):
        among = _outside_head(model, every) if isinstance(glob, ModuleNames) and glob.is_all_linear else every
        matched = {name: slot for name, slot in among.items() if _matches(name, slot, glob)}
        matched |= {
            name: table for name, table in tables.items() if _says_embedding(glob, name) and matches(name, glob)
        }
        if not matched:
            raise RecipeError(f"{stated} matches no layer of the model. {_why(model, every, glob)}")
        layers.update(matched)
    for glob, stated in entries(exclude, "exclude"):
        if not any(_matches(name, slot, glob) for name, slot in (every | layers).items()):
            raise RecipeError(f"{stated} matches no layer of the model. {_why(model, every, glob)}")
    layers = {name: slot for name, slot in layers.items() if not any(_matches(name, slot, glob) for glob in exclude)}
    if not layers:
        requested = "the default targets" if targets is None else f"`targets` {list(map(str, targets))}"
        without = f" without {list(map(str, exclude))}" if exclude else ""
        raise RecipeError(
            f"{requested}{without} match no layer of the model. {_unsupported(model)}{_could_match(every)}"
        )
    order = {module: number for number, module in enumerate(model.modules())}
    return dict(sorted(layers.items(), key=lambda item: order[item[1].module]))


def _matches(name: str, slot: Slot, glob: NamePattern) -> bool:
    """Return whether a pattern means a weight: by its name, or by that of the module where it has several."""
    return matches(name, glob) or (slot.attribute != "weight" and matches(name.rpartition(".")[0], glob))


def warn_of_missed(model: nn.Module, layers: Collection[str]) -> None:
    """Warn, once for all of them, of weights in the blocks that the default targets do not cover.

    Args:
        layers: names of the targeted layers.
    """
    coverage = block_coverage(model, layers)
    if sum(coverage.missed.values()) > NEGLIGIBLE * coverage.total:
        remedies = []
        if coverage.missed.keys() - coverage.unsupported:
            remedies.append(
                "Stacked experts and convolutions are pruned where `targets` names them beside the other layers, as in "
                "targets: ['*_proj', '*.experts']"
            )
        large = [kind for kind in coverage.unsupported if coverage.missed[kind] > NEGLIGIBLE * coverage.total]
        if large:
            names = ", ".join(kind.rpartition(" (")[0] for kind in sorted(large)[:6])
            remedies.append(f"No target can name {names}: only weights of {known_kinds()} are supported")
        logger.warning(
            f"the targeted layers have {coverage.share:.1%} of the weights in the blocks of {type(model).__name__}. "
            f"These are not among the default targets, and stay dense: {coverage.describe_missed()}. The requested "
            f"sparsity is that of the targeted layers. {'. '.join(remedies)}"
        )


def _outside_head(model: nn.Module, layers: Mapping[str, Slot]) -> dict[str, Slot]:
    """Return the linear layers inside the base model, without the output embeddings: what PEFT calls "all-linear"."""
    base, output = getattr(model, "base_model", model), getattr(model, "get_output_embeddings", lambda: None)()
    inside = set(base.modules()) if isinstance(base, nn.Module) else set(model.modules())
    return {
        name: slot
        for name, slot in layers.items()
        if slot.module in inside and slot.module is not output and is_linear(slot.module)
    }


def _why(model: nn.Module, layers: Mapping[str, Slot], glob: NamePattern) -> str:
    """Explain why a glob matches no prunable layer, and what would."""
    modules = {name: module for name, module in model.named_modules() if name and matches(name, glob)}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        others = [] if weight is None else [other for other in names_of(model, weight) if other != f"{name}.weight"]
        if is_matrix_layer(module) and others:
            return f"The weight of '{name}' is tied to '{others[0]}': pruning one would prune the other"
    kinds = Counter(type(module).__name__ for module in modules.values() if _has_matrix(module))
    if kinds:
        listed = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"It matches {listed} (first: '{next(iter(modules))}'), and only {known_kinds()} are supported"
    parameters = [
        name
        for name, held in model.named_parameters()
        if held.ndim > 1 and (fnmatchcase(name, str(glob)) or name.rpartition(".")[0] in modules)
    ]
    if parameters:
        return f"It matches the parameter '{parameters[0]}', and only weights of {known_kinds()} are supported"
    return _nearest(layers, glob) + (_could_match(layers) or _unsupported(model))


def _nearest(layers: Mapping[str, Slot], glob: NamePattern) -> str:
    """Name the spellings that are nearest to a glob, or to what PEFT would call target modules."""
    requested, hint, start = str(glob), "", "*."
    if isinstance(glob, ModuleNames):
        start = ""
        if isinstance(glob.value, str):
            if difflib.get_close_matches(requested.lower(), [ALL_LINEAR], cutoff=0.8):
                return f"Did you mean '{ALL_LINEAR}'? "
            hint = "A string is a regular expression over whole names; a list has names, or ends of names. "
    spellings: dict[str, None] = {}
    for name in layers:
        parts = kind_of_name(name).split(".")
        ends = [".".join(parts[cut:]) for cut in range(1, len(parts))]
        spellings.update(dict.fromkeys(f"{start}{end}" for end in ends if start or "*" not in end))
        spellings.update(dict.fromkeys((name, ".".join(parts)) if start else (name,)))
    nearest = difflib.get_close_matches(requested, spellings, n=3)
    shown = [f"['{each}']" if hint else f"'{each}'" for each in nearest]
    return f"Did you mean {' or '.join(shown)}? {hint}" if nearest else hint


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim > 1


def _unsupported(model: nn.Module) -> str:
    """Name the layers of a model whose blocks have no layers of a known kind."""
    classes: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if _has_matrix(module) and not (is_matrix_layer(module) or isinstance(module, nn.Embedding)):
            classes.setdefault(type(module).__name__, []).append(name)
    if not classes or block_layers(model):
        return ""
    kind, names = max(classes.items(), key=lambda item: len(item[1]))
    return f"Its layers are {len(names)} {kind} ({_listed(names, 6)}), and only {known_kinds()} are supported. "


def _could_match(layers: Mapping[str, Slot]) -> str:
    return f"It could match: {_listed(layers, 40)}." if layers else ""


def _listed(names: Iterable[str], limit: int) -> str:
    """List kinds of layers, not each layer."""
    kinds = Counter(map(kind_of_name, names))
    return ", ".join(f"{kind} ({count})" for kind, count in list(kinds.items())[:limit])
