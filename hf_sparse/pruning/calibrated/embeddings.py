"""Embeddings that get another form, fitted to how often each token occurs: before all blocks, which see it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SparsityError
from ..compressions import FormGroup
from ..processes import sum_over_processes
from .recording import Stop, run_model
from .tasks import LayerUpdate, OnLayer
from .tokens import kept_tokens


def fit_embeddings(
    model: nn.Module, groups: Sequence[FormGroup], batches: Iterable[Mapping[str, Any]], on_layer: OnLayer | None
) -> None:
    """Replace the embeddings of these groups.

    Args:
        batches: keyword arguments of the model.
        on_layer: called with what happened to each.

    Raises:
        SparsityError: if one took no part.
    """
    found = [(group, name, layer) for group in groups if group.compression.fits_inputs
             for name, layer in group.layers.items() if isinstance(layer, nn.Embedding)]  # fmt: skip
    if not found:
        return
    counts = token_counts(model, {name: layer.weight for _, name, layer in found}, batches)
    for group, name, layer in found:
        if not int(counts[name].sum()):
            raise SparsityError(
                f"'{name}' took no part in the forward passes over the calibration batches, so nothing is known of its "
                "tokens. Give batches that use it, or exclude it"
            )
        dense, often = layer.weight.detach(), counts[name][:, None]
        new = group.compression.replace_fitted(model, name, layer, counts[name])
        change, whole = ((part.square() * often).sum().double() for part in (new - dense, dense.float()))
        norms = [float(torch.linalg.vector_norm(part)) for part in (new - dense, dense.float())]
        if on_layer is not None:
            on_layer(
                LayerUpdate(name, 0.0, norms[0] / (norms[1] or 1.0), float(change / whole) if float(whole) else 0.0)
            )


def token_counts(
    model: nn.Module, tables: Mapping[str, Tensor], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Return how often each row of some tables is looked up, by all modules that share it, on all processes together.

    The model runs to its end on the first batch, and on the others until it has looked up as often as there.

    Args:
        tables: weights of embeddings by name.
    """
    counts = {name: torch.zeros(len(table), dtype=torch.float64, device=table.device) for name, table in tables.items()}
    batch: Mapping[str, Any] = {}
    calls, most = 0, 0  # of this batch, and of the first one

    def hook(name: str, path: str) -> Any:
        def observed(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal calls
            kept = kept_tokens(batch, path, None)(args[0][..., None])
            ids = args[0].reshape(-1) if kept is None else args[0][kept]
            counts[name] += torch.bincount(ids, minlength=len(counts[name]))
            calls += 1
            if calls == most:
                raise Stop

        return observed

    handles = [
        module.register_forward_pre_hook(hook(name, path))
        for path, module in model.named_modules()
        for name, table in tables.items()
        if isinstance(module, nn.Embedding) and module.weight is table
    ]
    try:
        for batch in batches:
            calls = 0
            run_model(model, batch)
            most = most or calls
    finally:
        for handle in handles:
            handle.remove()
    for found in counts.values():
        sum_over_processes(found)
    return counts
