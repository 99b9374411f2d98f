"""Modules of transformers with weights beside those of torch: `Conv1D` of GPT-2, and experts stacked in one tensor."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..modeling.layer_kinds import KeptTokens, LayerKind, MatrixView, TransposedLinear, register_layer_kind

_UP = ("gate_up_proj", "up_proj")
_DOWN = "down_proj"


class StackedExperts(LayerKind):
    """Weights of all experts of a mixture in one tensor: `(experts, out, in)`, or `(experts, in, out)` if transposed.

    As a matrix, the rows of one expert are below those of another. All classes of transformers that its
    `use_experts_implementation` knows (Mixtral, the mixtures of Qwen, gpt-oss, ...) say which way round they are,
    whether they have a gate and biases, and are called with tokens, the experts of each token, and router weights.
    """

    title = "experts of transformers"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(vars(module).get("is_transposed"), bool) and bool(self.attributes(module))

    def attributes(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in (*_UP, _DOWN) if _dimensions(module, name) == 3)

    def transposed(self, module: nn.Module) -> bool:
        """Return whether the inputs of an expert come before its outputs."""
        return bool(vars(module)["is_transposed"])

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        return MatrixView(self.shape(module, attribute), (0, 2, 1) if self.transposed(module) else (0, 1, 2), rows=2)

    def parts(self, module: nn.Module, attribute: str) -> int | None:
        return self.shape(module, attribute)[0]

    def part_view(self, module: nn.Module, attribute: str) -> MatrixView:
        return MatrixView(self.shape(module, attribute)[1:], (1, 0) if self.transposed(module) else (0, 1))

    def not_observable(self, module: Any) -> str | None:
        stated = all(isinstance(vars(module).get(name), bool) for name in ("has_gate", "has_bias"))
        if stated and callable(getattr(module, "_apply_gate" if module.has_gate else "act_fn", None)):
            return None
        return "it holds the weights of all experts, and does not state how each of them computes"

    def part_inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], parts: Collection[int], kept: KeptTokens
    ) -> Iterator[tuple[str, int, Tensor]]:
        """Yield the tokens that the router gives to each expert, and what its gate makes of them for `down_proj`."""
        hidden, chosen = _tokens_and_experts(module, args, kwargs)
        counted = kept(hidden)
        hidden, chosen = hidden.reshape(-1, hidden.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        if counted is not None:
            hidden, chosen = hidden[counted.flatten()], chosen[counted.flatten()]
        reached = torch.bincount(chosen.flatten().clamp_min(0)).tolist()
        up = _UP[0] if module.has_gate else _UP[1]
        for expert in parts:
            if expert < len(reached) and reached[expert]:
                rows = hidden[(chosen == expert).any(1)]
                yield up, expert, rows
                yield _DOWN, expert, _activated(module, up, expert, rows)


class Llama4Experts(StackedExperts):
    """Experts of Llama 4, `(experts, in, out)`: each is called with all tokens, one expert after the other.

    The router has multiplied the tokens by its weights, which are 0 for an expert that a token does not go to.
    """

    title = "experts of Llama 4"

    def matches(self, module: nn.Module) -> bool:
        return any(cls.__name__ == "Llama4TextExperts" for cls in type(module).__mro__)

    def transposed(self, module: nn.Module) -> bool:
        return True

    def not_observable(self, module: Any) -> str | None:
        return None

    def part_inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], parts: Collection[int], kept: KeptTokens
    ) -> Iterator[tuple[str, int, Tensor]]:
        """Yield the tokens that the router gives to each expert, and what its gate makes of them for `down_proj`."""
        (hidden,) = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]
        of_experts = hidden.reshape(module.num_experts, -1, hidden.shape[-1])
        counted = kept(of_experts[0])
        for expert in parts:
            rows = of_experts[expert] if counted is None else of_experts[expert][counted]
            rows = rows[(rows != 0).any(1)]
            if len(rows):
                yield _UP[0], expert, rows
                weight = module.gate_up_proj[expert]
                gate, up = (rows.to(weight.dtype) @ weight).chunk(2, dim=1)
                yield _DOWN, expert, up * module.act_fn(gate)


def _tokens_and_experts(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the first two arguments of a call; the second has different names."""
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    _, hidden, chosen, *_ = given.values()
    return hidden, chosen


def _activated(module: Any, up: str, expert: int, rows: Tensor) -> Tensor:
    """Return what goes into `down_proj` of an expert, as transformers computes it from its tokens."""
    weight = getattr(module, up)[expert]
    out = rows.to(weight.dtype) @ (weight if module.is_transposed else weight.t())
    if module.has_bias:
        out = out + getattr(module, f"{up}_bias")[expert]
    activated: Tensor = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    return activated


def _dimensions(module: nn.Module, name: str) -> int:
    held = module._parameters.get(name)
    if held is None and parametrize.is_parametrized(module, name):
        held = module.parametrizations[name].original  # type: ignore[index,union-attr]
    return 0 if held is None else held.ndim


register_layer_kind(TransposedLinear(), Conv1D)
register_layer_kind(StackedExperts())
register_layer_kind(Llama4Experts())
