"""RMSNorm modules of models that generate: one operator for a few tokens, where plain torch calls eight."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.library import library
from ..kernels.rms_norm import reference, rms_norm
from ..kernels.validation import needs_derivative
from ..modeling.class_swap import swap_class
from .fused_parts import RuntimeBlock, is_observed

MOST = 1 << 14
"""Elements of an input: more of them are not a few tokens, and torch shares its work among threads."""


class FewTokenRMSNorm(RuntimeBlock):
    """An RMSNorm that is computed by one operator where a few tokens are given.

    Attributes:
        few_token_norm: its eps, and what is added to its weight.
    """

    instance_attributes = ("few_token_norm",)
    weight: Tensor
    few_token_norm: tuple[float, float]

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        """Return what the plain module returns, to rounding.

        Shapes: `(..., features)` -> `(..., features)`

        Args:
            named: the input by the name that the plain module has for it.
        """
        # A compiler fuses the plain operators, and would take a look at the size for a limit of it.
        if x is not None and not named and not torch.compiler.is_compiling() and self._takes(x):
            return rms_norm(x, self.weight, *self.few_token_norm)
        out: Tensor = super().forward(*(() if x is None else (x,)), **named)  # type: ignore[misc]
        return out

    def _takes(self, x: Tensor) -> bool:
        weight = self.weight
        few = 0 < x.numel() <= MOST and x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu
        fits = few and x.shape[-1:] == weight.shape
        return fits and not needs_derivative(x, weight) and not torch.is_autocast_enabled("cpu")


def use_operator(model: nn.Module) -> None:
    """Let the RMSNorm modules of a model compute with the operator, where the C++ kernels are there."""
    for module, parameters in _rms_norms(model) if library() is not None else ():
        swap_class(module, FewTokenRMSNorm)
        vars(module)["few_token_norm"] = parameters


def _rms_norms(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[float, float]]]:
    """Yield the RMSNorm modules, and their eps and offset.

    Each family of transformers has a class of its own: what they compute counts. Classes from elsewhere may compute
    something else for inputs that are not tried here, and are left alone.
    """
    known: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in known:
            named = kind.__name__.endswith(("RMSNorm", "T5LayerNorm"))
            known[kind] = named and kind.__module__.startswith("transformers.models.") and _takes_one(kind)
        if known[kind] and (found := _parameters(module)) is not None:
            yield module, found


def _takes_one(kind: type[nn.Module]) -> bool:
    return len(inspect.signature(kind.forward).parameters) == 2  # itself and the input


@torch.no_grad()
def _parameters(module: Any) -> tuple[float, float] | None:
    """Return eps and offset of a module that computes an RMSNorm of fp32; None of any other."""
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if weight is None or not alone or is_observed(module):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    plain = weight.dtype == torch.float32 and weight.is_cpu and weight.dim() == 1
    if not isinstance(eps, float) or eps <= 0 or not plain:
        return None
    # Rows of unlike sizes, of which the smallest shows the eps.
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, 4, len(weight), generator=generator, dtype=torch.float32, device="cpu")
    x *= torch.tensor([[1.0], [100.0], [1e6], [eps**0.5]])
    try:
        expected = module(x)
    except Exception:  # noqa: BLE001  whatever it is, it is not that formula
        return None
    for offset in (0.0, 1.0):
        same = expected.dtype == x.dtype and expected.shape == x.shape
        if same and torch.allclose(reference(x, weight, eps, offset), expected, rtol=1e-5, atol=1e-7):
            return eps, offset
    return None
