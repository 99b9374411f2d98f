"""Look at every linear layer of a model: how sparse it is, and whether it can be packed."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import BackendError
from ..modeling.layer_kinds import Slot, slots_of
from ..modeling.layer_matching import InRuntimeForm
from ..modeling.model_state import sparse_weights
from ..modeling.ownership import count_owners
from ..pruning.masked_weight import MaskedWeight
from .lazy_weights import peek
from .packed_linear import is_dispatched

logger = logging.getLogger(__name__)

MIN_SPARSITY = 0.1
"""Fraction of zeros below which no kernel is tried: none is faster than dense there."""


@dataclasses.dataclass(frozen=True)
class LayerDecision:
    """What was found out and decided about a layer.

    Attributes:
        kernel: of the report.
        reason: why it stays dense; None while it can be packed.
        speedups: by token count, where they were measured.
        away: whether its weight is not in the memory of the device that packs: offloaded, or on another device.
    """

    layer: nn.Linear
    sparsity: float
    kernel: str = "dense"
    reason: str | None = None
    speedups: Mapping[int, float] = dataclasses.field(default_factory=dict)
    away: bool = False

    def stays_dense(self, reason: str, speedups: Mapping[int, float] | None = None) -> LayerDecision:
        """Return the decision to leave the layer dense."""
        return dataclasses.replace(self, reason=reason, speedups=self.speedups if speedups is None else speedups)

    def takes(self, kernel: str, speedups: Mapping[int, float]) -> LayerDecision:
        """Return the decision to pack the layer."""
        return dataclasses.replace(self, kernel=kernel, reason=None, speedups=speedups)


def survey(model: nn.Module, *, gpu: bool = False) -> dict[str, LayerDecision]:
    """Return a first decision about every linear layer of a model: dense for a reason, or not decided yet.

    Args:
        gpu: whether it is on a GPU, where other types than float32 compute too.

    Raises:
        BackendError: for layers whose weights are not plain numbers, of a type that is packed.
    """
    owners = count_owners(model)
    decisions = {}
    for name, module in model.named_modules():
        if isinstance(module, InRuntimeForm):
            raise BackendError(
                f"to_runtime got a model that is already in runtime form ('{name}' is packed). Call "
                "hf_sparse.to_dense_runtime(model) first to choose again"
            )
        if not isinstance(module, nn.Linear) and type(module).__name__ not in _QUANTIZED:
            continue
        _refuse(name, module, gpu)
        assert isinstance(module, nn.Linear)
        away = _why_away(module, gpu)
        weight = _weight_of(module)
        known = weight.numel() and not weight.is_meta
        sparsity = 1.0 - int(torch.count_nonzero(weight)) / weight.numel() if known else 0.0
        shared = owners[id(module._parameters["weight"])] > 1
        reason = away or _why_dense(module, sparsity, shared)
        decisions[name] = LayerDecision(module, sparsity, reason=reason, away=away is not None)
    return decisions


def _weight_of(module: nn.Linear) -> torch.Tensor:
    """Return the weight of a layer; of one that accelerate offloads, as its hook loads it."""
    stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    weight: torch.Tensor = stored["weight"] if module.weight.is_meta and stored is not None else peek(module.weight)
    return weight


def _why_away(module: nn.Linear, gpu: bool) -> str | None:
    """Return why the weight of a layer cannot be packed where it is."""
    if module.weight.is_meta or getattr(getattr(module, "_hf_hook", None), "offload", False):
        return "it is offloaded, or on the meta device: there is no weight in memory to pack"
    if not gpu and module.weight.device.type != "cpu":
        return f"it is on {module.weight.device}, and the requested kernels are for the CPU"
    return None


def warn_of_others(model: nn.Module) -> None:
    """Warn, once for all, of sparse weights that no kernel computes: of convolutions, `Conv1D`, stacked experts."""
    slots = {name: Slot.of(model, name) for name in sparse_weights(model)}
    sizes = {name: math.prod(slot.shape) for name, slot in slots.items()}
    others = [name for name, slot in slots.items() if not isinstance(slot.module, nn.Linear)]
    if others:
        share = sum(sizes[name] for name in others) / max(1, sum(sizes.values()))
        logger.warning(
            f"to_runtime packs linear layers. {len(others)} sparse weights of other layers (first: {others[0]}), "
            f"{share:.1%} of all entries that are pruned, are computed dense, with their zeros"
        )


def refuse_dense(model: nn.Module, decisions: Mapping[str, LayerDecision]) -> None:
    """Raise `BackendError` if no layer can be packed."""
    if any(decision.reason is None for decision in decisions.values()):
        return
    away = next((name for name, decision in decisions.items() if decision.away), None)
    if away is not None:
        raise BackendError(
            f"to_runtime got a model of which nothing can be packed. Layer '{away}': {decisions[away].reason}. Load "
            'the whole model onto the CPU, without device_map or with device_map={"": "cpu"}, or move it there '
            "(model.to('cpu')); a model that is on a GPU as a whole takes backend 'auto'"
        )
    sparsest = max(decisions.items(), key=lambda item: item[1].sparsity, default=None)
    result = (
        "it has no linear layer"
        if sparsest is None
        else f"the sparsest of its {len(decisions)} linear layers, '{sparsest[0]}', has {sparsest[1].sparsity:.1%} "
        f"zeros and stays dense: {sparsest[1].reason}"
    )
    if other := _sparse_of_other_kinds(model):
        raise BackendError(
            f"to_runtime got a {type(model).__name__} whose sparse layers are {other}, which no kernel packs: they "
            f"compute densely, with their zeros. It packs nn.Linear, and {result}"
        )
    raise BackendError(
        f"to_runtime got a {type(model).__name__} in which nothing is sparse: {result}. It packs layers with at least "
        f"{MIN_SPARSITY:.0%} zeros; prune the model first (hf_sparse.sparsify, or SparsityCallback)"
    )


def _sparse_of_other_kinds(model: nn.Module) -> str:
    """Return which layers other than `nn.Linear` have enough zeros, as in "8 Conv1D (first: 'h.0.c_fc')"."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        slots = [] if isinstance(module, nn.Linear) else [slot for slot in slots_of(module) if slot.tensor.numel()]
        for weight in (peek(slot.tensor) for slot in slots):
            if 1.0 - int(torch.count_nonzero(weight)) / weight.numel() >= MIN_SPARSITY:
                found.setdefault(type(module).__name__, []).append(name)
                break
    return " and ".join(f"{len(names)} {kind} (first: '{names[0]}')" for kind, names in found.items())


def _why_dense(module: nn.Linear, sparsity: float, shared: bool) -> str | None:
    if not module.weight.numel():
        return "it is empty: compaction has removed it"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, which may compute something else than nn.Linear"
    if shared:
        return "its weight is shared with another module (tied embeddings)"
    if "forward" in vars(module) and not is_dispatched(module):
        return "its forward method was replaced on this module"
    if sparsity < MIN_SPARSITY:
        return f"too few zeros: {sparsity:.1%}, and below {MIN_SPARSITY:.0%} dense is faster"
    return None


_QUANTIZED = ("QuantLinear", "MarlinLinear", "BitLinear", "AutoBitLinear", "EetqLinear", "HQQLinear")

_COMPUTED = {
    "weight_g": "weight_norm: torch.nn.utils.remove_weight_norm(layer)",
    "weight_mask": "torch.nn.utils.prune: torch.nn.utils.prune.remove(layer, 'weight')",
    "weight_orig": "spectral_norm: torch.nn.utils.remove_spectral_norm(layer)",
}
"""Attribute -> what computes the weight of a layer in each forward pass, and how to end that."""


def _refuse(name: str, module: nn.Module, gpu: bool) -> None:
    """Raise `BackendError` if the weight of a layer cannot be packed, so that the user has to decide."""
    found = f"to_runtime got a model whose layer '{name}'"
    if parametrize.is_parametrized(module):
        raise BackendError(f"{found} is {_parametrized(module)}")
    if name.rpartition(".")[2] == "base_layer":
        raise BackendError(f"{found} is wrapped in adapters. Merge them first: model = model.merge_and_unload()")
    weight = module._parameters.get("weight")
    computed = next((how for key, how in _COMPUTED.items() if hasattr(module, key)), None)
    if weight is None and computed is not None:
        raise BackendError(
            f"{found} has a weight that is computed in each forward pass. Make it a parameter, {computed}"
        )
    if weight is None or not weight.is_floating_point() or type(module).__name__ in _QUANTIZED:
        kind = type(module).__name__ if weight is None else f"{type(module).__name__} with {weight.dtype}"
        raise BackendError(f"{found} is quantized ({kind}). Load it without quantization, or call model.dequantize()")
    if not gpu and weight.device.type == "cpu" and weight.dtype != torch.float32:
        raise BackendError(
            f"{found} is in {weight.dtype}; the CPU kernels compute in float32. Cast it: model.float() (or load it "
            "with dtype=torch.float32)"
        )


def _parametrized(module: nn.Module) -> str:
    steps = [step for chain in module.parametrizations.values() for step in chain]  # type: ignore[operator]
    if any(isinstance(step, MaskedWeight) for step in steps):
        return "still masked. Finish pruning first: Pruner.bake() (SparsityCallback calls it at the end of training)"
    names = ", ".join(sorted({type(step).__name__.lstrip("_") for step in steps}))
    return (
        f"parametrized ({names}): its weight is computed in each forward pass. Make it a parameter: "
        "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    )
