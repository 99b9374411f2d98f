"""Random weights that show every mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

EMBEDDINGS = ("embed", "shared.", "wte", "wpe")


def build(
    make: Callable[..., Any], norms: tuple[str, ...], seed: int, draw_embeddings: bool = False, **options: Any
) -> Any:
    """Return a model with weights so large, and biases so different from zero, that nothing passes by being small.

    Args:
        norms: parts of the names of parameters that are moved like biases, and not drawn.
    """
    torch.manual_seed(seed)
    model = make(**options).eval()
    inputs_first = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or any(part in name for part in norms):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif not any(part in name for part in EMBEDDINGS):
                fan = parameter.shape[0 if name.rpartition(".")[0] in inputs_first else -1]
                parameter.copy_(torch.randn_like(parameter) * fan**-0.5)
            elif draw_embeddings:
                parameter.copy_(torch.randn_like(parameter))
    return model
