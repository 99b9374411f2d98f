"""Depth: which transformer layers matter, measured on data, and a model without the others.

A layer that is removed is gone: the hidden states of the layer before it go into the one after it. What is left is a
smaller model of the same class, whose config says so, and which any tool loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import PatternError, RecipeError, SparsityError
from ..formats.structure import Edits
from ..modeling.blocks import block_prefixes
from ..modeling.integration import integration_of
from ..modeling.model_state import SPARSE_WEIGHTS
from ..utils.validation import check_batches, check_one_of
from .compaction import edits_of, remember_edits
from .even_cuts import follow, scalars
from .head_importance import loss_of
from .masked_weight import masks_on

Criterion = Literal["cosine", "loss"]
CRITERIA = ("cosine", "loss")
_INDEX = ("layer_idx", "layer_index", "layer_id", "layer_number")
"""Attributes with the number of a layer: caches are addressed by them."""


@torch.no_grad()
def layer_importance(model: nn.Module, batches: Iterable[Mapping[str, Any]], criterion: Criterion = "cosine") -> Tensor:
    """Return how much each transformer layer matters; higher is more.

    Args:
        model: with one list of transformer layers.
        batches: keyword arguments of the model. Padding is left out where a batch has an `attention_mask`.
        criterion: "cosine" = 1 - the cosine similarity of what goes into a layer and what comes out, the mean over
            tokens (block influence); "loss" = what the loss on the batches rises by without the layer, which needs
            labels and one pass for each layer.

    Shapes: `(layers,)`

    Raises:
        PatternError: if the model has no such list, or several.
        SparsityError: if there is no batch, or no loss where it is needed.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", equation 1.
    """
    check_batches(batches)
    check_one_of("criterion", criterion, CRITERIA)
    layers = stack_of(model)[1]
    training = model.training
    model.eval()
    try:
        found = _influence(model, layers, batches) if criterion == "cosine" else _rises(model, layers, list(batches))
    finally:
        model.train(training)
    return found


def _influence(model: nn.Module, layers: nn.ModuleList, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    meters = [_Meter(layer) for layer in layers]
    seen = 0
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            for meter in meters:
                meter.real = mask.bool() if mask is not None and mask.ndim == 2 else None
            model(**batch)
            seen += 1
    finally:
        for meter in meters:
            meter.handle.remove()
    if not seen:
        raise SparsityError("layer importance needs data, and there was no batch")
    if not all(meter.count for meter in meters):
        called = all(meter.calls for meter in meters)
        why = "every token of the batches is padding" if called else "a layer took no part in the forward pass"
        raise SparsityError(f"{why}, so the importance of layers is not known. Give batches with text")
    return torch.tensor([1.0 - meter.total / meter.count for meter in meters])


class _Meter:
    """A hook on a layer that adds up the cosine similarity of its input and its output."""

    def __init__(self, layer: nn.Module) -> None:
        self.real: Tensor | None = None
        self.total, self.count, self.calls = 0.0, 0, 0
        self.handle = layer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        self.calls += 1
        before = inputs[0] if inputs else named["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        similarity = F.cosine_similarity(before.double(), after.double(), dim=-1)
        if self.real is not None and self.real.shape == similarity.shape:
            similarity = similarity[self.real.to(similarity.device)]
        self.total, self.count = self.total + float(similarity.sum()), self.count + similarity.numel()


def _rises(model: nn.Module, layers: nn.ModuleList, batches: list[Mapping[str, Any]]) -> Tensor:
    if not batches:
        raise SparsityError("layer importance needs data, and there was no batch")

    def loss() -> float:
        return sum(float(loss_of(model, batch, "layer importance")) for batch in batches) / len(batches)

    whole, rises = loss(), []
    for layer in tqdm(layers, desc="Layers"):
        hook = layer.register_forward_hook(_skip, with_kwargs=True)
        try:
            rises.append(loss() - whole)
        finally:
            hook.remove()
    return torch.tensor(rises)


def _skip(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """Give the input of a layer as its output."""
    before = inputs[0] if inputs else named["hidden_states"]
    return before if isinstance(output, Tensor) else (before, *output[1:])


def stack_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and layers of the list of transformer layers of a model.

    Raises:
        PatternError: if there is none, or more than one.
    """
    names = [prefix.removesuffix(".") for prefix in block_prefixes(model)]
    if len(names) != 1:
        raise PatternError(
            f"removing layers needs one list of transformer layers, and {type(model).__name__} has {len(names)}"
            + (f" ({', '.join(names)})" if names else "")
        )
    layers = model.get_submodule(names[0])
    assert isinstance(layers, nn.ModuleList)
    return names[0], layers


@torch.no_grad()
def drop_layers(model: nn.Module, dropped: Sequence[int]) -> None:
    """Remove transformer layers from a model of transformers, in place.

    Layers are numbered anew, and with them what caches are addressed by; lists of the config with one entry for each
    layer (`layer_types`) lose theirs, and the number of layers is lowered. Edits of the layers that stay follow them.

    Args:
        dropped: numbers of the layers, from 0.

    Raises:
        RecipeError: for a number that the model does not have, or all of them.
        PatternError: if a config cannot express the model that would be left: a layer that depends on its number in
            another way. The model is then as it was.
        SparsityError: if there are masks on it.
    """
    name, layers = stack_of(model)
    count, gone = len(layers), set(dropped)
    if len(gone) != len(dropped) or not gone <= set(range(count)) or len(gone) == count:
        raise RecipeError(f"`dropped` must be some of the layers 0 to {count - 1}, each once, got {list(dropped)}")
    masked = next((path for path, module in model.named_modules() if masks_on(module)), None)
    if masked is not None:
        raise SparsityError(f"'{masked}' still has a mask. End the pruning first: Pruner.bake()")
    if not gone:
        return
    kept = [index for index in range(count) if index not in gone]
    integration = integration_of(model)
    changes = integration.without_layers(model, kept, count)
    before, after = integration.rebuilt(model, {}), None if changes is None else integration.rebuilt(model, changes)
    if changes is None or before is None or after is None:
        raise PatternError(f"{type(model).__name__} has no config that could say how many layers are left")
    _check_same(before, after, name, kept)
    edits = _renumbered(edits_of(model), name, kept)
    chosen = [layers[index] for index in kept]
    del layers[:]
    layers.extend(chosen)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            for attribute in _INDEX:
                if attribute in vars(module):
                    setattr(module, attribute, number)
    integration.change_config(model, changes)
    follow(model, before, after)
    remember_edits(model, edits)
    marked = SPARSE_WEIGHTS.get(model)
    if marked is not None:
        paths = (moved_path(path, name, kept) for path in marked)
        SPARSE_WEIGHTS.set(model, tuple(path for path in paths if path is not None))


def prune_layers(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], count: int, criterion: Criterion = "cosine"
) -> list[int]:
    """Remove the transformer layers that matter least on data (`layer_importance`), and return their numbers.

    Args:
        batches: keyword arguments of the model; with labels for the criterion "loss".
        count: how many to remove.
        criterion: see `layer_importance`.

    Raises:
        PatternError, RecipeError, SparsityError: as `layer_importance` and `drop_layers`.

    Example:
        >>> import hf_sparse
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=10, num_hidden_layers=3, **sizes))
        >>> removed = hf_sparse.prune_layers(model, [{"input_ids": torch.tensor([[1, 2, 3]])}], count=1)
        >>> len(removed), model.config.num_hidden_layers, len(model.model.layers)
        (1, 2, 2)
    """
    total = len(stack_of(model)[1])
    if type(count) is not int or not 0 <= count < total:
        raise RecipeError(f"`count` must be an integer in [0, {total}), the layers of the model, got {count!r}")
    order = layer_importance(model, batches, criterion).argsort(stable=True)
    chosen = sorted(order[:count].tolist())
    drop_layers(model, chosen)
    return chosen


def _check_same(before: nn.Module, after: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Raise `PatternError` unless each layer of a smaller model is built as the one that would take its place.

    Args:
        before, after: built from the config as it is, and from that of the smaller model.
    """
    old, new = before.get_submodule(name), after.get_submodule(name)
    for number, index in enumerate(kept):
        layer, other = old.get_submodule(str(index)), new.get_submodule(str(number))
        shapes, others = ({k: v.shape for k, v in each.state_dict().items()} for each in (layer, other))
        modules = dict(other.named_modules())
        if shapes == others and all(
            path in modules and _fixed(module) == _fixed(modules[path]) for path, module in layer.named_modules()
        ):
            continue
        raise PatternError(
            f"'{name}.{index}' would become layer {number}, and {type(before).__name__} builds another one there: it "
            "depends on its number in a way that the config cannot express. Remove other layers, or keep them"
        )


def _fixed(module: nn.Module) -> dict[str, object]:
    return {key: value for key, value in scalars(module).items() if key not in _INDEX}


def _renumbered(edits: Edits, name: str, kept: Sequence[int]) -> Edits:
    """Return edits under the names that their layers will have, without those of layers that go."""
    parts: dict[str, dict[str, Any]] = {}
    for kind, path, cut in edits:
        moved = moved_path(path, name, kept)
        if moved is not None:
            parts.setdefault(kind, {})[moved] = cut
    return Edits(**parts)


def moved_path(path: str, name: str, kept: Sequence[int]) -> str | None:
    """Return the name that a part of a model will have, None if its layer goes.

    Example:
        >>> moved_path("model.layers.3.mlp", "model.layers", [0, 3]), moved_path("model.norm", "model.layers", [0, 3])
        ('model.layers.1.mlp', 'model.norm')
    """
    if not path.startswith(f"{name}."):
        return path
    number, _, rest = path.removeprefix(f"{name}.").partition(".")
    return f"{name}.{kept.index(int(number))}.{rest}" if int(number) in kept else None
