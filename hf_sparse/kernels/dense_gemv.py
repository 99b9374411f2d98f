"""The operator `hf_sparse::dense_linear`: torch's linear layer, but a GEMV kernel of its own for a few tokens.

For one token, torch reads a weight of 32,128 x 512 two fifths as fast as that kernel does on one core, and a
column-major copy of it two thirds as fast. What needs a derivative, and what torch.autocast casts, is left to torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional_transforms import KEY, refuse_derivatives
from .library import library, why_not_built
from .registry import Kernel, Layout, register
from .validation import needs_derivative

FEW = 8
"""Maximum number of tokens that the kernel takes, in one pass over the weight; torch catches up with more."""

_library = torch.library.Library("hf_sparse", "FRAGMENT")
_library.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `x @ weight.T + bias`.

    Shapes:
        x: (..., in). weight: (out, in). bias: (out,). Result: (..., out).

    Raises:
        RuntimeError: shapes or types that torch refuses.

    Example:
        >>> dense_linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """
    if needs_derivative(x, weight, bias):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.hf_sparse.dense_linear(x, weight, bias)
    return out


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() and 0 < x.numel() <= FEW * x.shape[-1] and weight.dim() == 2 and x.shape[-1] == weight.shape[1]:
        parts = (x, weight) if bias is None else (x, weight, bias)
        plain = all(part.dtype == torch.float32 and part.is_cpu for part in parts)
        fits = weight.is_contiguous() and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        own = not needs_derivative(*parts) and not torch.is_autocast_enabled("cpu")
        if own and plain and fits and (native := library()) is not None:
            return native.dense(x, weight, bias)
    return F.linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


_library.impl("dense_linear", _run, "CompositeExplicitAutograd")
_library.impl("dense_linear", refuse_derivatives(torch.ops.hf_sparse.dense_linear), KEY)
torch.library.register_fake("hf_sparse::dense_linear", _fake, lib=_library)


def _refusal(weight: Tensor) -> str | None:
    return None if weight.is_contiguous() else "it is not contiguous"


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, out_features: int, in_features: int) -> Tensor:
    return dense_linear(x, weight, bias)


register(
    Kernel(
        name="dense_few",
        backend="",  # of the LM head alone
        layout=Layout(("weight",), lambda weight, rows: (weight,), lambda parts, rows, out, width: parts[0]),
        op=_matmul,
        isas=("avx512vbmi", "avx512", "avx2", "neon", "portable"),
        guard=_refusal,
        unavailable=why_not_built,
    )
)
