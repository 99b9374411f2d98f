"""Self-attention whose query, key and value are packed together: their matmul and all heads in one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import KERNELS
from ..kernels.types import Norm
from ..modeling.architectures import Attention, AttentionFusion, SubBlock
from ..modeling.class_swap import Swapped, plain_class_of, swap_class
from .fused_parts import FusedParts, RuntimeBlock, child
from .packed_linear import PackedLinear, is_short
from .residual_norm import FusedEnd
from .shared_input import SharedInput, SharedParts, share

_NOT_FUSED = ("output_attentions", "encoder_hidden_states", "position_bias", "softcap", "cache", "is_causal")
"""Arguments that the operator does not know; with one of them, attention is computed as before."""


class _CoreParts(SharedParts):
    """What the core of a self-attention computes with.

    Args:
        block: the sub-block, whose query, key and value are packed together.
    """

    def __init__(self, block: SubBlock) -> None:
        table, core = block.table, block.core
        assert isinstance(table, Attention)
        first: Any = next(iter(block.inputs.values()))
        super().__init__(core, [_below(table.core, path) or "" for path in table.inputs], first.joint)
        self.first: PackedLinear = first
        self.short = self.first.short
        self.fusion = table.fusion
        self.output_path = _below(table.core, table.output) or ""
        self.size = block.size


class FusedSelfAttention(SharedInput):
    """The core of a self-attention that computes all heads in the operator of its packed layers.

    What the operator does not compute (a cache, a causal mask, attention weights, another implementation of attention)
    is computed as before, by the packed layers.
    """

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the plain module returns."""
        core: _CoreParts = self.shared_input
        if is_short(hidden_states, core.short):  # each of the three layers computes for itself
            return super(SharedInput, self).forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        if args or not takes(self, core, hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        fusion = core.fusion
        assert fusion is not None
        out = heads(core.first, core.size, float(getattr(self, fusion.scale)), hidden_states, attention_mask)
        return (child(self, core.output_path)(out) if fusion.core_has_output else out), None


class _BlockParts:
    """What the module around the core computes with, see `ResidualNorm`."""

    def __init__(self, block: SubBlock, end: FusedEnd) -> None:
        assert isinstance(block.table, Attention)
        self.core: Any = block.core
        self.output: Any = block.output
        self.end = end
        self.short = max(self.core.shared_input.short, self.output.short)
        core = [block.table.core] if block.table.core else []
        self.parts = FusedParts(block.module, [*core, block.table.output, *end.paths])


class FusedAttentionBlock(RuntimeBlock):
    """An attention block: core, output layer, residual and layer norm in one operator."""

    instance_attributes = ("fused_block",)
    fused_block: _BlockParts

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the plain module returns."""
        block: _BlockParts = self.fused_block
        if not args and not is_short(hidden_states, block.short) and block.parts.intact():
            module, norm = block.core, block.end.operand()
            core: _CoreParts = module.shared_input
            if norm is not None and takes(module, core, hidden_states, attention_mask, kwargs):
                assert core.fusion is not None
                scale = float(getattr(module, core.fusion.scale))
                return heads_and_norm(core, block.output, scale, norm, hidden_states, attention_mask), None
        return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]


def heads(first: Any, size: int, scale: float, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute all heads of an attention from the first of its packed layers.

    Shapes: `(batch, length, in)` -> `(batch, length, heads * size)`
    """
    first.check(hidden)
    packed = first.packed
    return KERNELS[packed.kernel].fused["attention"](
        *(hidden, *packed.operands, first.joint.bias(), mask),
        *(packed.rows, packed.out_features, packed.in_features, packed.out_features // (3 * size), scale),
    )


def heads_dense(layers: Sequence[nn.Module], size: int, scale: float, hidden: Tensor) -> Tensor:
    """Compute the same by calling query, key and value, as the modules of transformers do.

    Shapes: `(batch, length, in)` -> `(batch, length, heads * size)`
    """
    query, key, value = (layer(hidden).unflatten(-1, (-1, size)).transpose(1, 2) for layer in layers)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out.transpose(1, 2).flatten(2)


def multiply_joint(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Return the outputs of query, key and value from one matmul, as `SharedInput` computes them."""
    held = layers[0].joint.open()
    out = [layer(x) for layer in layers]
    held.clear()
    return out


def heads_and_norm(
    core: _CoreParts, output: PackedLinear, scale: float, norm: Norm, hidden: Tensor, mask: Tensor | None
) -> Tensor:
    """Compute all heads, the output layer after them, and the norm of the sum with the input.

    Shapes: `(batch, length, in)` -> `(batch, length, in)`
    """
    first = core.first
    first.check(hidden)
    output.check(hidden)
    packed, after = first.packed, output.packed
    return KERNELS[packed.kernel].fused["attention_norm"](
        *(hidden, *packed.operands, core.joint.bias(), *after.operands, output.bias, *norm, mask),
        *(packed.rows, after.rows, after.in_features, packed.in_features),
        *(after.in_features // core.size, scale),
    )


def takes(module: Any, core: _CoreParts, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Return whether the operator computes what a call of a self-attention asks for."""
    fusion = core.fusion
    assert fusion is not None
    config = getattr(module, fusion.config)
    if module.training or getattr(config, "_attn_implementation", None) != "sdpa" or getattr(module, fusion.causal):
        return False
    if kwargs.get("past_key_values") is not None or any(kwargs.get(name) not in (None, False) for name in _NOT_FUSED):
        return False
    if hidden.dim() != 3 or not core.parts.intact():
        return False
    if mask is None:
        return True
    batch, length = hidden.shape[:2]
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    return (
        fits and mask.shape[2] in (1, length) and mask.shape[3] == length and mask.dtype in (torch.bool, hidden.dtype)
    )


def fusion_of(block: SubBlock) -> AttentionFusion | None:
    """Return how the core of a self-attention can be computed in one operator; None if that is not known."""
    table, core = block.table, block.core
    if not isinstance(table, Attention) or table.fusion is None or isinstance(core, Swapped):
        return None
    return table.fusion if type(core).__name__ in table.fusion.cores and block.is_own(core) else None


def fuse(block: SubBlock) -> None:
    """Let a self-attention, whose query, key and value are packed together, compute with them."""
    table, core = block.table, block.core
    assert isinstance(table, Attention)
    if not block.is_own(core) or not all(_below(table.core, path) for path in table.inputs):
        return  # a class that is not known may change its input between the three
    parts = _CoreParts(block)
    fusion = fusion_of(block) if KERNELS[parts.first.kernel].fused else None
    share(core, parts, SharedInput if fusion is None else FusedSelfAttention)
    if fusion is None or fusion.residual is None:
        return
    output, end = block.output, FusedEnd(block, fusion.residual)
    packed = isinstance(output, PackedLinear) and output.joint is None and output.kernel == parts.first.kernel
    known = plain_class_of(block.module).__name__ in fusion.blocks and block.is_own(block.module)
    if packed and known and end.fusible and not isinstance(block.module, Swapped):
        swap_class(block.module, FusedAttentionBlock)
        around: Any = block.module
        around.fused_block = _BlockParts(block, end)


def _below(core: str, path: str) -> str | None:
    """Return a path as seen from the core; None if it does not lead through it.

    Example:
        >>> _below("self", "self.query"), _below("", "q_lin"), _below("self", "output.dense")
        ('query', 'q_lin', None)
    """
    if not core:
        return path
    return path.removeprefix(f"{core}.") if path.startswith(f"{core}.") else None
