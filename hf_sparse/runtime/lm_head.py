"""The LM head: its weight stays dense, and a GEMV kernel of this package reads it for a few tokens.

A model that generates multiplies one token with the embedding table of all tokens at each step, which takes most of the
time that pruning leaves. The weight, what is tied to it and the state dict stay what they are. Where bfloat16 holds
every value exactly, as in most published checkpoints, the kernel reads a copy with half the bytes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..kernels import KERNELS
from ..kernels.bitmask import is_bfloat16
from ..kernels.dense_gemv import FEW, dense_linear
from ..modeling.class_swap import swap_class
from .autotune import TOLERANCE, Measurement, SpeedTable, Trial
from .fused_parts import RuntimeBlock
from .packed_weight import Packed, RoundingErrors
from .survey import LayerDecision

KERNEL = "dense_few"
"""Name in the report: dense, by another kernel for a few tokens."""

TOKENS = (1, 16, 128)
"""Token counts that are timed. The smallest has to be faster; the others must not be slower."""

Copy = tuple[str, tuple[Tensor, ...]]
"""A weight packed for few tokens: the kernel, and its tensors."""


class Stamp:
    """Which values a copy was made of, by what torch counts of changes of a tensor in place.

    A copy of a model (deepcopy, pickle) has a parameter of its own: its stamp takes the first one that it meets.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        self.seen = None if weight is None else _values_of(weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return Stamp, ()

    def fits(self, weight: Tensor) -> bool:
        """Return whether a weight has the values still, as far as that is counted: `weight.data` is not."""
        if torch.compiler.is_compiling() or weight.is_inference():
            return True
        if self.seen is None:
            self.seen = _values_of(weight)
        owner, version = self.seen
        return owner() is weight and version == weight._version


def _values_of(weight: Tensor) -> tuple[weakref.ref[Tensor], int]:
    return weakref.ref(weight), 0 if weight.is_inference() else weight._version


class FewTokenLinear(RuntimeBlock):
    """A dense layer that is computed by the GEMV kernel where a few tokens are multiplied with it.

    Attributes:
        few_token_copy: of the weight, for a few tokens; None = the kernel reads the weight.
        few_token_stamp: which values the copy has; the weight is read where it has others now.
    """

    instance_attributes = ("few_token_copy", "few_token_stamp")
    weight: Tensor
    bias: Tensor | None
    few_token_copy: Copy | None
    few_token_stamp: Stamp

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`.

        Shapes: `(..., in_features)` -> `(..., out_features)`
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            out: Tensor = super().forward(x)  # type: ignore[misc]
            return out
        few = self.few_token_copy
        if few is not None and not self.few_token_stamp.fits(self.weight):
            few = None
        return multiply(x, self.weight, self.bias, few)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, few: Copy | None) -> Tensor:
    """Return `x W^T + b`: of a few tokens from the copy, if there is one, and of any number where the copy is rounded.

    The outputs of a model must not depend on the number of tokens in a call.
    """
    if few is None or x.dtype != torch.float32:
        return dense_linear(x, weight, bias)
    kernel, parts = few
    if KERNELS[kernel].exact and not 0 < x.numel() <= FEW * weight.shape[1]:
        return dense_linear(x, weight, bias)
    return KERNELS[kernel].op(x, *parts, bias, 1, *weight.shape)


def errors_of(layer: nn.Linear, few: Copy) -> RoundingErrors:
    """Measure the errors of the matmul with a copy."""
    kernel, parts = few
    return Packed(kernel, 1, layer.out_features, layer.in_features, parts).errors(layer.weight)


@torch.no_grad()
def copy_of(layer: nn.Linear, kernel: str) -> Copy | None:
    """Return the copy for a few tokens, packed as other layers are; None where it would be hardly smaller."""
    weight = layer.weight.detach()
    kernel = KERNELS[kernel].lm_head or kernel
    if KERNELS[kernel].exact and not is_bfloat16(weight):
        return None
    return kernel, KERNELS[kernel].pack(weight)


def lm_head_of(model: nn.Module) -> nn.Linear | None:
    """Return the LM head of a model that generates, if the GEMV kernel can read it."""
    can, head = getattr(model, "can_generate", None), getattr(model, "get_output_embeddings", None)
    if not callable(can) or not can() or not callable(head):
        return None
    layer = head()
    if type(layer) is not nn.Linear or "forward" in vars(layer) or parametrize.is_parametrized(layer):
        return None
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return layer if plain and min(weight.shape) > 1 else None


@torch.no_grad()
def measure(
    layer: nn.Linear, table: SpeedTable, tokens: Iterable[int] = TOKENS, few: Copy | None = None
) -> dict[int, Measurement]:
    """Time the layer as it is ("dense") and with the GEMV kernel ("packed"), by token count."""
    kind = KERNEL if few is None else f"{KERNEL} of a copy, {few[0]}"
    weight, bias = layer.weight.detach(), layer.bias
    measured = {}
    for count in tokens:
        x = torch.randn(count, layer.in_features, dtype=torch.float32, device="cpu")
        trial = Trial(kind, (tuple(weight.shape),), 0, (0,), count)
        measured[count] = table.measure(
            trial,
            lambda x=x: nn.functional.linear(x, weight, bias),  # type: ignore[misc]
            lambda x=x: multiply(x, weight, bias, few),  # type: ignore[misc]
        )
    return measured


def is_faster(measured: Mapping[int, Measurement]) -> bool:
    """Return whether the kernel is faster at the smallest token count, and not slower at any other."""
    smallest = measured[min(measured)]
    return smallest.is_faster and all(each.speedup >= 1.0 - TOLERANCE for each in measured.values())


def use_few_token_kernel(layer: nn.Linear, few: Copy | None = None) -> None:
    """Let the GEMV kernel read the layer, or its copy."""
    swap_class(layer, FewTokenLinear)
    vars(layer)["few_token_copy"] = few
    vars(layer)["few_token_stamp"] = Stamp(layer.weight)


def extra_bytes(layer: nn.Module) -> int:
    """Return the bytes of the copy that a layer keeps beside its weight."""
    few: Copy | None = vars(layer).get("few_token_copy")
    return 0 if few is None else sum(part.nbytes for part in few[1])


def decide(decision: LayerDecision, speedups: Mapping[int, float]) -> LayerDecision:
    """Return the decision about an LM head that uses the kernel."""
    smallest = min(speedups, default=0)
    gain = f", {speedups[smallest]:.1f}x at {smallest} token{'s' if smallest > 1 else ''}" if smallest else ""
    few: Copy | None = vars(decision.layer).get("few_token_copy")
    types = "" if few is None else str(few[1][0].dtype).removeprefix("torch.")
    copied = f", that reads a copy in {types}," if types else ""
    reason = f"dense, with a GEMV kernel{copied} for a few tokens{gain} ({decision.reason})"
    return dataclasses.replace(decision, kernel=KERNEL, speedups=speedups, reason=reason)
