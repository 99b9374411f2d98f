"""Modules of transformers with weights beside those of torch: `Conv1D` of GPT-2, and experts stacked in one tensor."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..modeling.layer_kinds import LayerKind, MatrixView, TransposedLinear, register_layer_kind

_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


class StackedExperts(LayerKind):
    """Weights of all experts of a mixture in one tensor: `(experts, out, in)`, or `(experts, in, out)` if transposed.

    As a matrix, the rows of one expert are below those of another. All classes of transformers that its
    `use_experts_implementation` knows (Mixtral, the mixtures of Qwen, gpt-oss, ...) say which way round they are.
    """

    title = "experts of transformers"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(vars(module).get("is_transposed"), bool) and bool(self.attributes(module))

    def attributes(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in _EXPERTS if _dimensions(module, name) == 3)

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        transposed = vars(module)["is_transposed"]
        return MatrixView(self.shape(module, attribute), (0, 2, 1) if transposed else (0, 1, 2), rows=2)

    def not_observable(self, module: nn.Module) -> str | None:
        return "it holds the weights of all experts, and which tokens each of them is given is not seen from outside"


def _dimensions(module: nn.Module, name: str) -> int:
    held = module._parameters.get(name)
    if held is None and parametrize.is_parametrized(module, name):
        held = module.parametrizations[name].original  # type: ignore[index,union-attr]
    return 0 if held is None else held.ndim


register_layer_kind(TransposedLinear(), Conv1D)
register_layer_kind(StackedExperts())
