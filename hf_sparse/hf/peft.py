"""Adapters of PEFT on a sparse model: merging them keeps its zeros, and says how much of the update that costs.

PEFT merges by adding to `base_layer.weight` in place. No hook of torch sees that, and PEFT offers none; but it gives
each layer that it adapts to a new module under the name `base_layer`, and the whole model to a new one under the name
`model`. torch calls a global hook whenever a module is given to another. The one here gives the new module a `merge`,
an `unmerge` and a `merge_and_unload` of its own, which call those of its class and put the zeros back. So nothing of
PEFT is changed for other models, every kind of adapter that merges (LoRA, DoRA, LoHa, IA3, ...) is covered, and all
that this relies on are public names. PEFT is not imported, and need not be installed.

Which weights are zero is noted when PEFT takes the layer, in one bit per weight: some adapters (PiSSA, OLoRA) change
the weights before they train, and a weight that is kept can become zero by chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import SparsityError
from ..formats.codecs.base import pack_bits, unpack_bits
from ..modeling.model_state import KEPT, SPARSE_WEIGHTS, UPDATE, check_model
from ..modeling.zero_preservation import keeps_zeros
from . import patches

logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class MergedUpdate:
    """What merging adapters would have added to the sparse weights, and what of it fell on zeros.

    Attributes:
        norm: Frobenius norm of the update, over all layers that have been merged.
        lost: Frobenius norm of its part that fell on zeros.
        layers: the lost fraction of each layer, by name.
    """

    norm: float
    lost: float
    layers: dict[str, float]

    @property
    def lost_fraction(self) -> float:
        """Norm of what was lost, relative to the norm of the update, in [0, 1]."""
        return self.lost / self.norm if self.norm else 0.0


def merged_update(model: nn.Module) -> MergedUpdate:
    """Report how much of the adapters that are merged into a sparse model was lost to its zeros.

    Args:
        model: what `merge_and_unload` returned, or the model of PEFT between `merge_adapter` and `unmerge_adapter`.

    Raises:
        SparsityError: if no adapters are merged into sparse weights of the model.

    Example:
        >>> from hf_sparse.hf.peft import merged_update
        >>> # model = peft_model.merge_and_unload()
        >>> # merged_update(model).lost_fraction
    """
    check_model(model)
    update = _update_of(model)
    if not update.layers:
        raise SparsityError(
            f"no adapters are merged into sparse weights of this {type(model).__name__}, so there is no update to "
            "report. Call merge_and_unload() or merge_adapter() first"
        )
    return update


def _update_of(model: nn.Module) -> MergedUpdate:
    found = {name: u for name, module in model.named_modules() if (u := UPDATE.get(module)) is not None}
    return MergedUpdate(
        norm=sum(norm for norm, _ in found.values()) ** 0.5,
        lost=sum(lost for _, lost in found.values()) ** 0.5,
        layers={name: (lost / norm) ** 0.5 if norm else 0.0 for name, (norm, lost) in found.items()},
    )


def _guard(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Give a module that PEFT puts around a sparse layer, or around a whole sparse model, verbs that keep zeros."""
    verbs: dict[str, Callable[..., Any]] = {}
    if name == "base_layer" and child is not None and keeps_zeros(_innermost(child)):
        verbs = {"merge": _merge, "unmerge": _unmerge}
        weight = _innermost(child).weight
        if not weight.is_meta:  # an offloaded one is looked at when it is merged
            KEPT.set(parent, _kept_bits(weight))
    elif name == "model" and child is not None and SPARSE_WEIGHTS.get(child) is not None:
        verbs = {"merge_and_unload": _merge_and_unload, "merge_adapter": _merge_adapter}
    for verb, ours in verbs.items():
        theirs = getattr(type(parent), verb, None)
        if theirs is not None:
            # A partial, because it goes along into copies and pickles.
            patches.put(parent, verb, update_wrapper(partial(ours, parent), theirs))


def _innermost(layer: nn.Module) -> Any:
    while isinstance(inner := layer._modules.get("base_layer"), nn.Module):
        layer = inner
    return layer


def _kept_bits(weight: Tensor) -> Tensor:
    return torch.from_numpy(pack_bits((weight.detach() != 0).view(-1).cpu().numpy()))


def _kept(layer: nn.Module, weight: Tensor) -> Tensor:
    bits = KEPT.get(layer)
    if bits is None:
        bits = _kept_bits(weight)
        KEPT.set(layer, bits)
    flags = unpack_bits(bits.numpy(), weight.numel(), "kept weights")
    return torch.from_numpy(flags).view(weight.shape).to(weight.device)


@torch.no_grad()
def _merge(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    base = _innermost(layer)
    before = base.weight.detach().clone()
    kept = _kept(layer, before)
    try:
        return cast(Any, type(layer)).merge(layer, *args, **kwargs)
    finally:
        update = base.weight.detach() - before
        norm, lost = (float(part.float().square().sum()) for part in (update, update[~kept]))
        if norm or getattr(layer, "merged", False):
            earlier = UPDATE.get(base) or (0.0, 0.0)
            UPDATE.set(base, (earlier[0] + norm, earlier[1] + lost))
        base.weight.data.masked_fill_(~kept, 0)


@torch.no_grad()
def _unmerge(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    base = _innermost(layer)
    try:
        return cast(Any, type(layer)).unmerge(layer, *args, **kwargs)
    finally:
        base.weight.data.masked_fill_(~_kept(layer, base.weight), 0)
        UPDATE.pop(base)


def _merge_and_unload(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    _warn_of_quantized(tuner.model)
    model = type(tuner).merge_and_unload(tuner, *args, **kwargs)
    log_update(model)
    return model


def _merge_adapter(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    _warn_of_quantized(tuner.model)
    result = type(tuner).merge_adapter(tuner, *args, **kwargs)
    log_update(tuner.model)
    return result


def _warn_of_quantized(model: Any) -> None:
    if getattr(model, "quantization_method", None) == "bitsandbytes":
        logger.warning(
            "merging adapters into a model that bitsandbytes has quantized fills its zeros. To keep them, load the "
            "packed model without quantization_config and merge into that"
        )


def log_update(model: nn.Module) -> None:
    """Say what of the adapters that were merged fell on zeros of a model; nothing if no weight is sparse."""
    update = _update_of(model)
    if update.layers:
        logger.warning(
            f"merged adapters into {len(update.layers)} sparse weights and kept their zeros: "
            f"{update.lost_fraction:.1%} of the update fell on zeros and is lost (Frobenius norm {update.lost:.4g} of "
            f"{update.norm:.4g})"
        )


patches.on_registration(_guard)
