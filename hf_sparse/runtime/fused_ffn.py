"""Feed-forward sub-blocks with packed layers: both matmuls and the activation between them in one operator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..kernels import KERNELS
from ..kernels.types import Norm
from ..modeling.architectures import FeedForward, FeedForwardFusion, SubBlock
from ..modeling.class_swap import Swapped, plain_class_of, swap_class
from .fused_parts import FusedParts, RuntimeBlock, child
from .packed_linear import PackedLinear, is_short
from .packed_weight import Packed
from .residual_norm import FusedEnd
from .shared_input import SharedParts, share

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
"""Activations that the operators compute, as plain functions."""


def feed_forward(
    x: Tensor, packed: list[Packed], biases: list[Tensor | None], activation: str, norm: Norm | None = None
) -> Tensor:
    """Compute first layers, activation and last layer in one operator; with a norm, also `norm(x + output)`.

    Shapes: `(..., in)` -> `(..., out)`
    """
    parts: list[Any] = []
    for weight, bias in zip(packed, biases, strict=True):
        parts += [*weight.operands, bias]
    first, last = packed[0], packed[-1]
    operators = KERNELS[first.kernel].fused
    if norm is not None:
        return operators["ffn_norm"](
            *(x, *parts, *norm, first.rows, last.rows, first.out_features, first.in_features, activation)
        )
    sizes = (first.out_features, last.out_features, first.in_features)
    operator = operators["ffn" if len(packed) == 2 else "gated_ffn"]
    return operator(x, *parts, *(weight.rows for weight in packed), *sizes, activation)


def multiply(layers: Sequence[Any], x: Tensor, activation: str, norm: Norm | None = None) -> Tensor:
    """Compute a feed-forward sub-block from its packed layers, the output layer last."""
    for layer in layers:
        layer.check(x)
    return feed_forward(x, [layer.packed for layer in layers], [layer.bias for layer in layers], activation, norm)


def multiply_dense(layers: Sequence[nn.Module], x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the same by calling the layers one by one."""
    *inputs, output = layers
    out: Tensor = output(_gated(inputs, x, function))
    return out


class _Parts:
    """What a fused feed-forward sub-block computes with.

    Args:
        block: the sub-block, with its packed layers.
        fusion: its description.
        activation: name that the operators have for the activation; None = the layers are called one by one.
    """

    def __init__(self, block: SubBlock, fusion: FeedForwardFusion, activation: str | None) -> None:
        table, module = block.table, block.module
        assert isinstance(table, FeedForward)
        self.table, self.fusion, self.activation = table, fusion, activation
        self.layers: tuple[Any, ...] = (*block.inputs.values(), block.output)
        self.inner_dropout, self.output_dropout = (
            None if path is None else module.get_submodule(path)
            for path in (fusion.inner_dropout, fusion.output_dropout)
        )
        first = self.layers[0]
        self.short = first.short if isinstance(first, PackedLinear) else 0
        self.end = None if fusion.residual is None else FusedEnd(block, fusion.residual)
        kernel = getattr(block.output, "kernel", None)
        self.takes_norm = len(self.layers) == 2 and kernel is not None and "ffn_norm" in KERNELS[kernel].fused
        paths = [*table.inputs, table.output, *(() if self.end is None else self.end.paths)]
        paths += [path for path in (fusion.inner_dropout, fusion.output_dropout) if path is not None]
        is_module = isinstance(table.function(module), nn.Module)
        self.parts = FusedParts(
            module, [*paths, table.activation] if is_module else paths, () if is_module else [table.activation]
        )


class FusedFeedForward(RuntimeBlock):
    """A module whose feed-forward method computes its packed layers in one operator."""

    instance_attributes = ("fused_ffn",)
    fused_ffn: _Parts

    def swapped_call(self: Any, hidden_states: Tensor) -> Tensor:
        """Return what the plain method returns."""
        fused: _Parts = self.fused_ffn
        if fused.activation is not None and not is_short(hidden_states, fused.short) and fused.parts.intact():
            if fused.end is not None:
                if fused.takes_norm and (norm := fused.end.operand()) is not None:
                    return multiply(fused.layers, hidden_states, fused.activation, norm)
                return fused.end.apply(multiply(fused.layers, hidden_states, fused.activation), hidden_states)
            if fused.inner_dropout is None or not fused.inner_dropout.training:
                out = multiply(fused.layers, hidden_states, fused.activation)
                return out if fused.output_dropout is None else fused.output_dropout(out)
        if fused.fusion.reads_output_weight and isinstance(child(self, fused.table.output), PackedLinear):
            return _one_by_one(self, fused, hidden_states)
        plain: Tensor = getattr(self.plain_class, self.method)(self, hidden_states)
        return plain


class UnchunkedFeedForward(FusedFeedForward):
    """A feed-forward module that calls its method itself, without `apply_chunking_to_forward`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the plain module returns."""
        if self.chunk_size_feed_forward or len(args) != 1 or kwargs or not _is_known(self, ("self", "input")):
            plain: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return plain
        out: Tensor = getattr(self, self.method)(*args)
        return out


class UnchunkedLayer(FusedFeedForward):
    """The same of a layer with an attention."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the plain module returns."""
        crossed = kwargs.get("encoder_hidden_states") if len(args) < 3 else args[2]
        simple = len(args) <= 3 and crossed is None and not self.chunk_size_feed_forward
        if not simple or not _is_known(self, _LAYER_ARGUMENTS):
            plain: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return plain
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            kwargs.pop(name, None)
        out: Tensor = getattr(self, self.method)(child(self, self.fused_ffn.fusion.attention)(*args[:2], **kwargs)[0])
        return out


_LAYER_ARGUMENTS = (
    *("self", "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
    *("past_key_values", "kwargs"),
)
"""Of the forward method of `BertLayer`."""

_LAYER_BASE = "transformers.modeling_layers"
"""Where the base class of layers is, which wraps their forward methods for gradient checkpointing."""

_KNOWN: dict[tuple[Any, tuple[str, ...]], bool] = {}
"""Whether a forward method has these arguments, and is that of transformers."""


def _is_known(module: Any, arguments: tuple[str, ...]) -> bool:
    """Return whether the forward method of the plain class has these arguments, and is not patched."""
    if is_compiling():
        return False  # a compiler pays for the plain one once
    cls: Any = plain_class_of(module)
    key = cls.forward, arguments
    if key not in _KNOWN:
        functions = [cls.forward]
        while hasattr(functions[-1], "__wrapped__"):
            functions.append(functions[-1].__wrapped__)
        places = {getattr(each, "__globals__", {}).get("__name__") for each in functions}
        own = places <= {cls.__module__, _LAYER_BASE}
        _KNOWN[key] = own and tuple(inspect.signature(cls.forward).parameters) == arguments
    return _KNOWN[key]


def _mixin(fusion: FeedForwardFusion) -> type[FusedFeedForward]:
    if not fusion.chunks:
        return FusedFeedForward
    return UnchunkedFeedForward if fusion.attention is None else UnchunkedLayer


def is_fusible(block: SubBlock) -> bool:
    """Return whether `fuse` knows what the feed-forward sub-block computes."""
    table = block.table
    if not isinstance(table, FeedForward) or table.fusion is None or isinstance(block.module, Swapped):
        return False
    if not block.is_plain:
        return False
    if not all(block.is_own(module) for module in (block.module, *containers(block))):
        return False
    inner = table.fusion.inner_dropout
    return inner is None or isinstance(block.module.get_submodule(inner), (nn.Dropout, nn.Identity))


def reads_output_weight(block: SubBlock) -> bool:
    """Return whether a feed-forward sub-block looks at the weight of its output layer, which would be unpacked."""
    table = block.table
    return isinstance(table, FeedForward) and table.fusion is not None and table.fusion.reads_output_weight


def containers(block: SubBlock) -> list[nn.Module]:
    """Return the modules that hold the layers of a feed-forward sub-block, if it does not hold them itself."""
    assert isinstance(block.table, FeedForward)
    paths = (*block.table.inputs, block.table.output)
    return [block.module.get_submodule(path) for path in sorted({path.rpartition(".")[0] for path in paths} - {""})]


def modules_inside(block: SubBlock) -> list[nn.Module]:
    """Return the modules of a feed-forward sub-block that an operator computes without calling them."""
    assert isinstance(block.table, FeedForward)
    function = block.table.function(block.module)
    activation = [function] if isinstance(function, nn.Module) else []
    return [*block.inputs.values(), block.output, *containers(block), *activation]


def activation_of(block: SubBlock) -> str | None:
    """Return the name that the operators have for the activation of a sub-block, or None. It is tried on numbers."""
    assert isinstance(block.table, FeedForward)
    function = block.table.function(block.module)
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None
    far = torch.tensor([9.0, 10.5, 16.0, 33.0, 100.0, 1e3, 1e4])  # some activations are clipped there
    probe = torch.cat([torch.linspace(-8, 8, 257), far, -far]).to(device="cpu", dtype=torch.float32)
    with torch.no_grad():
        out = function(probe.clone())
    # The exact GELU and its approximation by tanh are 5e-4 apart.
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(out, known(probe), atol=2e-6)), None)


def shares_input(block: SubBlock) -> bool:
    """Return whether `share_gate` may take the layers before the activation of a feed-forward sub-block."""
    table = block.table
    known = isinstance(table, FeedForward) and table.fusion is not None and table.fusion.method == "forward"
    return known and not reads_output_weight(block) and is_fusible(block)


def share_gate(block: SubBlock) -> None:
    """Let a feed-forward sub-block compute its layers before the activation, packed together, as one matmul."""
    assert isinstance(block.table, FeedForward)
    first: Any = next(iter(block.inputs.values()))
    share(block.module, SharedParts(block.module, block.table.inputs, first.joint))


def fuse(block: SubBlock, activation: str | None) -> None:
    """Let a feed-forward sub-block compute its packed layers in one operator.

    Args:
        activation: of `activation_of`; None if not all layers are packed, for blocks that read their output weight.
    """
    assert isinstance(block.table, FeedForward)
    fusion = block.table.fusion
    assert fusion is not None
    parts = _Parts(block, fusion, activation)
    swap_class(block.module, _mixin(fusion), fusion.method)
    module: Any = block.module
    module.fused_ffn = parts


def _one_by_one(module: nn.Module, fused: _Parts, x: Tensor) -> Tensor:
    """Compute a sub-block from the layers that it has now, without a look at the weight of the output layer."""
    table = fused.table
    hidden = _gated([child(module, path) for path in table.inputs], x, table.function(module))
    if fused.fusion.inner_dropout is not None:
        hidden = child(module, fused.fusion.inner_dropout)(hidden)
    out: Tensor = child(module, table.output)(hidden)
    return out


def _gated(inputs: Sequence[nn.Module], x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = function(inputs[0](x))
    for gate in inputs[1:]:
        hidden = hidden * gate(x)
    return hidden
