"""Models of transformers inside other modules: a SentenceTransformer, a CrossEncoder, an `nn.Module` of the user's."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...modeling.model_state import mark_sparse_weights, sparse_weights


def sparse_parts(module: nn.Module) -> list[PreTrainedModel]:
    """Return the outermost models of transformers in a module that have sparse weights, and mark these as theirs too.

    Adapters are left alone: PEFT saves them, not the model below.
    """
    if hasattr(module, "peft_config"):
        return []
    parts: dict[str, PreTrainedModel] = {}
    for path, inner in module.named_modules():
        if isinstance(inner, PreTrainedModel) and not any(path.startswith(f"{outer}.") for outer in parts):
            parts[path] = inner
    found = []
    for path, inner in parts.items():
        names = [name.removeprefix(f"{path}.") for name in sparse_weights(module) if name.startswith(f"{path}.")]
        if names:
            mark_sparse_weights(inner, names)
            found.append(inner)
    return found
