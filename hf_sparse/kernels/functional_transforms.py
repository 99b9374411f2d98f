"""Refuse torch.func.grad, jvp and the like on operators without a derivative: torch would take it for zero, silently.

A transform of torch.func unwraps its tensors before it calls an operator, so that the operator itself cannot see that a
derivative is wanted. The kernel here is called before that; outside of transforms it is never called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from .validation import check_no_derivative

KEY = "FuncTorchDynamicLayerBackMode"

# As they are outside of any transform: what runs below one is dispatched from the start.
_INCLUDED = torch._C._dispatch_tls_local_include_set()
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()
_NESTED = _INCLUDED | torch._C.DispatchKeySet(DispatchKey.FuncTorchDynamicLayerFrontMode)
_NESTED = _NESTED | torch._C.DispatchKeySet(DispatchKey.FuncTorchDynamicLayerBackMode)


def refuse_derivatives(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel of an operator for transforms: it refuses derivatives, and passes on everything else."""

    def below(*arguments: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        if interpreter.key() is not functorch.TransformType.Vmap:
            check_no_derivative(arguments)
            arguments = tuple(_unwrapped(argument) for argument in arguments)
        with interpreter.lower():
            nested = functorch.peek_interpreter_stack() is not None
            with torch._C._ForceDispatchKeyGuard(_NESTED if nested else _INCLUDED, _EXCLUDED):
                return operator(*arguments)

    return below


def _unwrapped(argument: Any) -> Any:
    if isinstance(argument, Tensor) and functorch.is_gradtrackingtensor(argument):
        return functorch.get_unwrapped(argument)
    return argument
