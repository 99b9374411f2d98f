"""Self-attention whose query, key and value are packed together: the product and all heads in one operator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.types import Norm
from ..modeling.architectures import SubBlock
from ..modeling.architectures.base import Changed, become
from .packed_linear import PackedLinear
from .residual_norm import is_own, norm_of, watched

_UNUSUAL = ("output_attentions", "encoder_hidden_states", "position_bias", "softcap", "cache", "is_causal")


class LeanSelf(Changed):
    """A self-attention module of BERT or its kin, without the layer after it.

    Whatever is unusual (a cache, a causal mask, weights that are asked for, another implementation of attention) is
    computed as before, with the packed layers one by one.
    """

    lean: tuple[str, str, str]

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the module returns."""
        if args or not usual(self, hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        return self.finish(heads(self, hidden_states, attention_mask)), None

    def finish(self, out: Tensor) -> Tensor:
        """Return what comes after the heads."""
        return out


class LeanDistilBertSelf(LeanSelf):
    """A self-attention module of DistilBERT, which has the layer after it inside."""

    def finish(self: Any, out: Tensor) -> Tensor:
        """Return the output of that layer."""
        product: Tensor = self.out_lin(out)
        return product


class LeanBlock(Changed):
    """The attention of BERT or its kin: the module around the self-attention, its output layer and the layer norm."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the module returns."""
        core, after = self.self, self.output
        if not args and usual(core, hidden_states, attention_mask, kwargs) and not watched(core):
            packed = isinstance(after.dense, PackedLinear) and after.dense.joint is None
            same = packed and after.dense.kernel == getattr(core, core.lean[0]).kernel
            if same and (norm := norm_of(after)) is not None:
                return whole(core, after.dense, norm, hidden_states, attention_mask), None
        return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]


_BLOCKS = ("BertAttention", "RobertaAttention", "XLMRobertaAttention", "CamembertAttention", "ElectraAttention")

_KINDS: dict[str, type[LeanSelf]] = {
    "BertSelfAttention": LeanSelf,
    "RobertaSelfAttention": LeanSelf,
    "XLMRobertaSelfAttention": LeanSelf,
    "CamembertSelfAttention": LeanSelf,
    "ElectraSelfAttention": LeanSelf,
    "DistilBertSelfAttention": LeanDistilBertSelf,
}


def heads(module: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Compute all heads of a self-attention module.

    Shapes: `(batch, length, in)` -> `(batch, length, heads * size)`
    """
    return mixed(getattr(module, module.lean[0]), module.attention_head_size, float(module.scaling), hidden, mask)


def mixed(first: Any, size: int, scale: float, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute all heads of an attention from the first of its packed layers.

    Shapes: `(batch, length, in)` -> `(batch, length, heads * size)`
    """
    first.check(hidden)
    packed = first.packed
    name = "int8" if packed.kernel == "int8" else "sparse"
    out: Tensor = getattr(torch.ops.hf_sparse, f"{name}_attention")(
        *(hidden, *packed.operands, first.joint.bias(), mask),
        *(packed.height, packed.out_features, packed.in_features, packed.out_features // (3 * size), scale),
    )
    return out


def plain(layers: Sequence[nn.Module], size: int, scale: float, hidden: Tensor) -> Tensor:
    """Compute the same with the layers one by one, as the modules of transformers do.

    Shapes: `(batch, length, in)` -> `(batch, length, heads * size)`
    """
    query, key, value = (layer(hidden).unflatten(-1, (-1, size)).transpose(1, 2) for layer in layers)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out.transpose(1, 2).flatten(2)


def whole(module: Any, output: PackedLinear, norm: Norm, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Compute all heads of a self-attention module, the output layer after it, and the norm of the sum with the input.

    Shapes: `(batch, length, in)` -> `(batch, length, in)`
    """
    first = getattr(module, module.lean[0])
    first.check(hidden)
    output.check(hidden)
    packed, after = first.packed, output.packed
    name = "int8" if packed.kernel == "int8" else "sparse"
    out: Tensor = getattr(torch.ops.hf_sparse, f"{name}_attention_norm")(
        *(hidden, *packed.operands, first.joint.bias(), *after.operands, output.bias, *norm, mask),
        *(packed.height, after.height, after.in_features, packed.in_features),
        *(after.in_features // module.attention_head_size, float(module.scaling)),
    )
    return out


def is_known(module: nn.Module, names: Collection[str]) -> bool:
    """Return whether a module is one of transformers, of a class with one of these names."""
    return type(module).__name__ in names and is_own(module)


def usual(module: Any, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Return whether the operator computes what a self-attention module is asked for."""
    if module.training or getattr(module.config, "_attn_implementation", None) != "sdpa" or module.is_causal:
        return False
    if kwargs.get("past_key_values") is not None or any(kwargs.get(name) not in (None, False) for name in _UNUSUAL):
        return False
    joint = getattr(module, module.lean[0]).joint
    if hidden.dim() != 3 or joint is None or any(watched(layer) for layer in joint.layers):
        return False
    if mask is None:
        return True
    batch, length = hidden.shape[:2]
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    return (
        fits and mask.shape[2] in (1, length) and mask.shape[3] == length and mask.dtype in (torch.bool, hidden.dtype)
    )


def takes(block: SubBlock) -> bool:
    """Return whether `become_lean` knows the self-attention of a sub-block."""
    return is_known(block.core, _KINDS)


def become_lean(block: SubBlock) -> None:
    """Let the self-attention of a sub-block, whose query, key and value are packed together, compute with them."""
    core = block.core
    if not takes(block):
        return
    mixin = _KINDS[type(core).__name__]
    prefix = len(block.table.core) + 1 if block.table.core else 0  # type: ignore[union-attr]
    names = tuple(path[prefix:] for path in block.table.inputs)
    if not all(hasattr(core, name) for name in names):
        return
    become(core, mixin)
    made: Any = core
    made.lean = names
    if is_known(block.module, _BLOCKS) and not isinstance(block.module, Changed):
        become(block.module, LeanBlock)


def restore(model: nn.Module) -> None:
    """Give all such modules of a model the class that they had."""
    for module in model.modules():
        if isinstance(module, (LeanSelf, LeanBlock)):
            vars(module).pop("lean", None)
            module.__class__ = module.plain  # type: ignore[assignment]
