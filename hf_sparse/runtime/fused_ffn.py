"""Feed-forward sub-blocks of packed layers: both products and the activation between them in one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.types import Norm
from ..modeling.architectures import SubBlock
from ..modeling.architectures.base import Changed, become
from .packed_linear import PackedLinear
from .packed_weight import Packed
from .residual_norm import is_own, norm_of, watched

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class Lean:
    """How a feed-forward sub-block of packed layers computes.

    Args:
        inputs: its first layers; of a gated one, that under the activation first.
        activation: name of the function between them, known to the kernels; None = they compute one by one.
        function: the function itself.
    """

    def __init__(
        self,
        inputs: tuple[nn.Module, ...],
        output: nn.Module,
        activation: str | None,
        function: Callable[[Tensor], Tensor],
    ) -> None:
        self.inputs, self.output, self.activation, self.function = inputs, output, activation, function

    @property
    def fused(self) -> bool:
        """Whether its layers compute in one operator."""
        return self.activation is not None

    def __call__(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """Return the output of the last layer; or with a norm, that of the sum of x and the output."""
        if not self.fused:
            out: Tensor = self.output(self.hidden(x))
            return out
        layers: list[Any] = [*self.inputs, self.output]
        for layer in layers:
            layer.check(x)
        assert self.activation is not None
        packed, biases = [layer.packed for layer in layers], [layer.bias for layer in layers]
        return feed_forward(x, packed, biases, self.activation, norm)

    def hidden(self, x: Tensor) -> Tensor:
        """Return what goes into the last layer, from the first ones one by one."""
        hidden = self.function(self.inputs[0](x))
        for gate in self.inputs[1:]:
            hidden = hidden * gate(x)
        return hidden

    def seen(self, *around: nn.Module) -> bool:
        """Return whether somebody looks at a module inside or at these around it, which then have to be called."""
        function = (self.function,) if isinstance(self.function, nn.Module) else ()
        return any(watched(module) for module in (*self.inputs, self.output, *function, *around))

    def takes_norm(self) -> bool:
        """Return whether the operator of its layers can add the input and compute a layer norm."""
        return self.fused and len(self.inputs) == 1 and getattr(self.output, "kernel", None) in ("cpu", "int8")


def feed_forward(
    x: Tensor, packed: list[Packed], biases: list[Tensor | None], activation: str, norm: Norm | None = None
) -> Tensor:
    """Compute first layers, activation and last layer in one operator; with a norm, that of the sum of x and all that.

    Shapes: `(..., in)` -> `(..., out)`
    """
    parts: list[Any] = []
    for weight, bias in zip(packed, biases, strict=True):
        parts += [*weight.operands, bias]
    first, last = packed[0], packed[-1]
    name = "int8" if first.kernel == "int8" else "sparse"
    if norm is not None:
        whole: Tensor = getattr(torch.ops.hf_sparse, f"{name}_ffn_norm")(
            *(x, *parts, *norm, first.height, last.height, first.out_features, first.in_features, activation)
        )
        return whole
    sizes = (first.out_features, last.out_features, first.in_features)
    operator = getattr(torch.ops.hf_sparse, f"{name}_ffn" if len(packed) == 2 else f"{name}_gated_ffn")
    out: Tensor = operator(x, *parts, *(weight.height for weight in packed), *sizes, activation)
    return out


class LeanBert(Changed):
    """A layer of BERT or its kin."""

    lean: Lean

    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        """Return what the layer returns for these tokens."""
        if self.lean.seen(self.intermediate, self.output):
            apart: Tensor = super().feed_forward_chunk(attention_output)  # type: ignore[misc]
            return apart
        if self.lean.takes_norm() and (norm := norm_of(self.output)) is not None:
            whole: Tensor = self.lean(attention_output, norm)
            return whole
        hidden = self.output.dropout(self.lean(attention_output))
        out: Tensor = self.output.LayerNorm(hidden + attention_output)
        return out


class LeanDistilBert(Changed):
    """A feed-forward part of DistilBERT."""

    lean: Lean

    def ff_chunk(self: Any, input: Tensor) -> Tensor:  # noqa: A002  the name that the class gives it
        """Return what the part returns for these tokens."""
        if self.lean.seen():
            apart: Tensor = super().ff_chunk(input)  # type: ignore[misc]
            return apart
        out: Tensor = self.dropout(self.lean(input))
        return out


class LeanT5(Changed):
    """A feed-forward part of T5, plain or gated. It does not look at the dtype of a weight, which would unpack it."""

    lean: Lean

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Return what the part returns."""
        lean = self.lean
        if lean.fused and not self.dropout.training and not lean.seen(self.dropout):
            whole: Tensor = lean(hidden_states)
            return whole
        out: Tensor = lean.output(self.dropout(lean.hidden(hidden_states)))
        return out


_KINDS: dict[str, type[Changed]] = {
    "feed_forward_chunk": LeanBert,
    "ff_chunk": LeanDistilBert,
    "wo": LeanT5,
}


def kind(block: SubBlock) -> type[Changed] | None:
    """Return what a sub-block becomes; None if nothing is known for its class, or it has changed already."""
    if isinstance(block.module, Changed) or not all(is_own(part) for part in (block.module, *parts_of(block))):
        return None
    return next((mixin for mark, mixin in _KINDS.items() if hasattr(block.module, mark)), None)


def parts_of(block: SubBlock) -> list[nn.Module]:
    """Return the modules of a feed-forward sub-block that hold its layers, if it does not hold them itself."""
    paths = (*block.table.inputs, block.table.output)
    return [block.module.get_submodule(path) for path in sorted({path.rpartition(".")[0] for path in paths} - {""})]


def function_of(block: SubBlock) -> Any:
    """Return the activation of a feed-forward sub-block."""
    found: Any = block.module
    for part in block.table.activation.split("."):  # type: ignore[union-attr]
        found = getattr(found, part)
    return found


def activation_of(block: SubBlock) -> str | None:
    """Return the name that the kernels have for the activation of a sub-block, or None. It is tried, not looked up."""
    function = function_of(block)
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None
    probe = torch.linspace(-8, 8, 257)
    with torch.no_grad():
        found = function(probe.clone())
    # The exact GELU and its approximation by tanh are 5e-4 apart.
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(found, known(probe), atol=2e-6)), None)


def become_lean(block: SubBlock, activation: str | None) -> None:
    """Let a feed-forward sub-block whose layers are packed compute with them."""
    mixin = kind(block)
    assert mixin is not None
    become(block.module, mixin)
    made: Any = block.module
    made.lean = Lean(tuple(block.inputs.values()), block.output, activation, function_of(block))


def restore(model: nn.Module) -> None:
    """Give all such sub-blocks of a model the class that they had."""
    for module in model.modules():
        if isinstance(module, (LeanBert, LeanDistilBert, LeanT5)):
            del module.lean
            module.__class__ = module.plain  # type: ignore[assignment]


def is_packed(layer: nn.Module) -> bool:
    """Return whether a layer is packed for the own kernels."""
    return isinstance(layer, PackedLinear) and layer.kernel != "csr"
